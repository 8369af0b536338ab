"""Which column of a table is which: as was said, or by its name."""

import difflib
import re
from collections.abc import Sequence

from bbqrec_jax.errors import InputError, printable, shown

# Names that columns have in the wild, letters and digits alone, the likeliest first.
LOG = {
  "user": "user userid customer customerid reviewerid visitorid memberid clientid shopper uid account accountid buyer"
  " buyerid person personid profileid subscriber session sessionid",
  "item": "item itemid product productid sku parentasin asin article articleid movie movieid filmid book bookid isbn"
  " track trackid song songid video videoid game gameid content contentid news newsid business businessid iid",
  "time": "timestamp time datetime date ts eventtime unixreviewtime reviewtime createdat created orderdate orderedat"
  " purchasedate purchasedat when unixtime epoch eventdate viewedat",
  "rating": "rating stars score overall value amount quantity playcount plays count",
  "event": "event eventtype action behavior behaviour interaction type kind",
}
ITEMS = {
  "item_id": "id " + LOG["item"],
  "title": "title name itemname productname producttitle movietitle articletitle booktitle displayname",
  "description": "description desc details text summary abstract features bulletpoints overview body",
  "brand": "brand maker manufacturer vendor author artist publisher store label director",
  "category": "category categories maincategory genre genres department type section class productcategory tags",
  "price": "price listprice cost amount",
  "image": "image imagepath imagefile imageurl imurl picture photo img thumbnail filename images poster",
}
SEVERAL = ("description", "category")  # May be several columns.


def choose(
  columns: Sequence[str], known: dict[str, str], asked: dict[str, str | tuple[str, ...]], required: Sequence[str], *,
  where: str,
) -> dict[str, tuple[str, ...]]:  # fmt: skip
  """Which columns of a table are what.

  Args:
    columns: of the table.
    known: by what a column can be, the names that say so; `LOG` or `ITEMS`.
    asked: by what a column can be, what was said: a name, names, "none", or "" to guess.
    required: what there must be.
    where: what to call the table in messages.

  Returns:
    The columns by what they are, of what was found; none is two things.

  Raises:
    InputError: if one that was asked for is not there, or one that must be there cannot be guessed.
  """
  chosen: dict[str, tuple[str, ...]] = {}
  for kind, given in asked.items():
    names = (given,) if isinstance(given, str) else given
    if names in (("",), (), ("none",)):
      continue
    for name in names:
      if name not in columns:
        close = difflib.get_close_matches(name, columns, 1)
        meant = f"did you mean {shown(close[0])}? it has" if close else "it has"
        raise InputError(f"{where}: expected a column {shown(name)} (--{kind}), found none; {meant} {listed(columns)}")
    chosen[kind] = tuple(names)
  taken = {name for names in chosen.values() for name in names}
  plain = {re.sub(r"[^0-9a-z]", "", name.lower()): name for name in reversed(columns) if name not in taken}
  for kind, usual in known.items():
    if kind in chosen or asked.get(kind) in ("none", ("none",)):
      continue
    found = [plain[name] for name in usual.split() if name in plain and plain[name] not in taken]
    if found:
      chosen[kind] = tuple(dict.fromkeys(found)) if kind in SEVERAL else (found[0],)
      taken |= set(chosen[kind])
  for kind in required:
    if kind not in chosen:
      raise InputError(
        f"{where}: expected a column with the {'id of the ' if kind in ('user', 'item') else ''}"
        f"{kind.replace('_', ' of the ')}, could not guess it among {listed(columns)}; say it with --{kind}=COLUMN"
        + (", or name the columns with --columns=user,item,... if the first line is no header" * (kind in LOG))
      )
  return chosen


def listed(columns: Sequence[str]) -> str:
  """The names of columns for a message."""
  more = f" and {len(columns) - 20} more" if len(columns) > 20 else ""
  return printable(", ".join(name if len(name) <= 40 else name[:40] + "..." for name in columns[:20])) + more


def said(chosen: dict[str, tuple[str, ...]], columns: Sequence[str]) -> str:
  """What was chosen, and what is not used, in words."""
  used = [f"{kind} = {' + '.join(names)}" for kind, names in chosen.items()]
  taken = {name for names in chosen.values() for name in names}
  unused = [name for name in columns if name not in taken]
  return ", ".join(used) + (f"; not used: {listed(unused)}" if unused else "")
