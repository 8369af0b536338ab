"""How raw data becomes a data set: every choice with its default and one sentence."""

import dataclasses

from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.settings import setting

DUPLICATES = ("exact", "first", "last", "consecutive", "keep")
TIES = ("file", "item", "shuffle")
REQUIRED = ("metadata", "picture")


@dataclasses.dataclass(frozen=True)
class PreparationSettings:
  """What `prepare` can be told; the flags of `bbqrec prepare` and the keywords of `bbqrec_jax.prepare`."""

  user: str = setting("", "The column of the log with the user's id; guessed if it is not given.")
  item: str = setting("", "The column of the log with the item's id; guessed likewise.")
  time: str = setting("", "The column of the log with the time: seconds to nanoseconds since 1970, or ISO dates;"
                      " guessed likewise. none: histories keep the order of the file.")  # fmt: skip
  rating: str = setting("", "The column of the log with a rating or an amount, which min_rating looks at; guessed"
                        " likewise.")  # fmt: skip
  event: str = setting("", "The column of the log with the kind of event, which events looks at; guessed likewise.")
  events: tuple[str, ...] = setting((), "Keep these kinds of events alone, as cart,purchase.")
  columns: tuple[str, ...] = setting((), "Names for the columns of a log (CSV, TSV) whose first line is no header.")
  time_format: str = setting("", "How dates are written that are not ISO, as %d/%m/%Y or %Y%m%d.")
  item_id: str = setting("", "The column of the item table with the item's id; guessed.")
  title: str = setting("", "The column of the item table with the title; guessed.")
  description: tuple[str, ...] = setting((), "The columns of the item table with further text; guessed.")
  brand: str = setting("", "The column of the item table with the brand, maker or author; guessed.")
  category: tuple[str, ...] = setting((), "The columns of the item table with categories; guessed.")
  price: str = setting("", "The column of the item table with the price; guessed.")
  image: str = setting("", "The column of the item table with the picture's file name, or the URL that it was"
                       " downloaded from; guessed. Without one, a picture is called like its item's id.")  # fmt: skip
  min_rating: float = setting(float("-inf"), "Leave out interactions with a lower rating or amount.", least=None)
  require: tuple[str, ...] = setting(
    (), "Leave out items that lack these, before duplicates and least numbers are looked at: metadata (a row of the"
    " item table), picture (a file in the folder of pictures; without a folder, a name or URL in the table).",
    subset=REQUIRED,
  )  # fmt: skip
  min_repeats: int = setting(1, "Leave out what a user did with an item fewer times than this.")
  duplicates: str = setting(
    "exact", "Of a user's interactions with one item, leave out: those of the very same time (exact), all but the first"
    " or the last, those that follow one another directly (consecutive), none (keep).", choices=DUPLICATES,
  )  # fmt: skip
  min_per_user: int = setting(3, "Leave out users with fewer interactions, and items of min_per_item, until nothing"
                              " changes: 5 and 5 is the 5-core; of 1 or 2 nothing is held out.")  # fmt: skip
  min_per_item: int = setting(1, "Leave out items with fewer interactions, likewise.")
  ties: str = setting("file", "The order of a user's interactions of the same time: as in the file, by the item's id,"
                      " or shuffled by the seed.", choices=TIES)  # fmt: skip
  seed: int = setting(0, "Of shuffled ties.", least=0, most=2**32 - 1)
  unseen_items: bool = setting(False, "Keep items of the item table that nobody has interacted with.")
  max_bad: float = setting(0.05, "Refuse a file if more than this share of its rows cannot be used.", most=1)

  def check(self, prefix: str) -> None:
    """Refuses columns without a name.

    Raises:
      InputError: if there is one.
    """
    if not all(self.columns):
      raise InputError(f"config field {prefix}columns must be names, got {self.columns!r}")
