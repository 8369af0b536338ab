"""The settings of the data."""

import dataclasses
import datetime

from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.settings import section, setting


def moment(text: str, *, field: str) -> float | None:
  """The second since 1970 that a date or a number says; None for "".

  Raises:
    InputError: if it says none.
  """
  if not text:
    return None
  try:
    return float(text)
  except ValueError:
    pass
  try:
    date = datetime.datetime.fromisoformat(text)
  except ValueError:
    raise InputError(f"{field}: expected a date, as 2024-03-01, or a second since 1970, got {text!r}") from None
  return (date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp()


SOURCES = ("synthetic", "directory", "recbole", "memory")


@dataclasses.dataclass(frozen=True)
class SyntheticSettings:
  """Data with planted structure; see `data.synthetic`."""

  num_users: int = setting(2000, "Users of the generated data.", most=10**7)
  num_items: int = setting(600, "Items of the generated data.", most=10**7)
  seed: int = setting(0, "Seed of the generated data alone; the run's own seed does not change the data.", least=0,
                      most=2**32 - 1)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DataSettings:
  """What a run is trained on."""

  source: str = setting(
    "directory", "directory (the project's own format), recbole (its atomic files), synthetic (planted structure),"
    " memory (what a program of yours gives), or tfds:NAME (of TensorFlow Datasets).",
  )  # fmt: skip
  path: str = setting("", "The folder of directory and recbole; of tfds that of its data, if not the usual one.")
  split: str = setting(
    "leave_one_out", "Each user's last two items are held out; or, temporal, what came from a moment on; or none, which"
    " learns from everything, for production.", choices=("leave_one_out", "temporal", "none"),
  )  # fmt: skip
  validation_from: str = setting("", "Of temporal: the date (ISO, UTC), or second since 1970, from which on"
                                 " interactions validate; empty: that at 80 % of them.")  # fmt: skip
  test_from: str = setting("", "Of temporal: likewise, to test; empty: that at 90 %.")
  modalities: tuple[str, ...] = setting((), "Names of the modalities to use, in order; empty for all that are found.")
  drop_short_users: bool = setting(
    False, "Drop users with fewer than 3 interactions, who are otherwise learned from, and not ranked."
  )
  drop_incomplete_items: bool = setting(False, "Drop items that lack one of the modalities, and their interactions.")
  synthetic: SyntheticSettings = section(SyntheticSettings, "Of the synthetic source.")

  def check(self, prefix: str) -> None:
    """Refuses a source that there is none of, moments that are none, and modalities without a name.

    Raises:
      InputError: if there is one.
    """
    if self.source not in SOURCES and not self.source.removeprefix("tfds:") != self.source:
      raise InputError(
        f"config field {prefix}source must be one of {', '.join(SOURCES)} or tfds:NAME, got {self.source!r}"
      )
    for name in ("validation_from", "test_from"):
      moment(getattr(self, name), field=f"config field {prefix}{name}")
      if getattr(self, name) and self.split != "temporal":
        raise InputError(f"config field {prefix}{name} is of {prefix}split = 'temporal', got {self.split!r}")
    if not all(self.modalities):
      raise InputError(f"config field {prefix}modalities must be names, got {self.modalities!r}")
