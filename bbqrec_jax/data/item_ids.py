"""The ids that a data source gives its items: what people type and read, where the program itself counts rows."""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from bbqrec_jax.errors import InputError, shown
from bbqrec_jax.utils.files import is_whole


class ItemIds:
  """The ids of N items: item k, row k of every array, is `ids[k]` to whoever made the data.

  They are strings, or integers where the source numbers its items itself (ascending, and not always without gaps, as
  items may have been left out). Text matches an integer id of its value, so that it does not matter whether a shell,
  a text file or JSON held it.
  """

  def __init__(self, values: Sequence[str] | np.ndarray):
    """Takes N distinct strings, or an array of N ascending integers.

    Raises:
      ValueError: if they are not distinct or not ascending.
    """
    self._numbers = values.astype(np.int64) if isinstance(values, np.ndarray) else np.zeros(0, np.int64)
    self._names = None if isinstance(values, np.ndarray) else tuple(values)
    if len(set(self._names or ())) < len(self._names or ()) or np.any(np.diff(self._numbers) <= 0):
      raise ValueError("expected item ids that differ, and ascend where they are integers")
    self._rows: dict[str, int] = {}

  @classmethod
  def numbered(cls, count: int) -> "ItemIds":
    """The ids 0..count - 1, of a source whose ids are the rows themselves."""
    return cls(np.arange(count))

  @classmethod
  def from_json(cls, values: Any) -> "ItemIds":
    """From what `to_json` gave, or anybody else.

    Raises:
      ValueError: if `values` is no list of distinct strings without line ends, or of ascending integers.
    """
    if isinstance(values, list) and all(type(value) is int and abs(value) < 2**63 for value in values):
      return cls(np.array(values, np.int64))
    if not isinstance(values, list) or not all(
      isinstance(value, str) and value and "\n" not in value and is_whole(value) for value in values
    ):
      raise ValueError("item ids: expected a list of strings without line ends, or of integers")
    return cls(values)

  def to_json(self) -> list[str] | list[int]:
    """As JSON holds them."""
    return list(self._names) if self._names is not None else self._numbers.tolist()

  def __len__(self) -> int:
    return len(self._numbers if self._names is None else self._names)

  def __getitem__(self, row: int) -> str | int:
    return self._names[row] if self._names is not None else int(self._numbers[row])

  @property
  def digest(self) -> str:
    """16 hexadecimal digits that change with any id or their order."""
    return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()[:16]

  @property
  def are_rows(self) -> bool:
    """Whether the ids are 0..N - 1, in order."""
    return self._names is None and np.array_equal(self._numbers, np.arange(len(self)))

  def keep(self, kept: np.ndarray) -> "ItemIds":
    """Those of the items that are kept, bool [N]."""
    if self._names is None:
      return ItemIds(self._numbers[kept])
    return ItemIds([name for name, here in zip(self._names, kept, strict=True) if here])

  def extended(self, new: "ItemIds | None", count: int, *, where: object) -> "ItemIds":
    """The ids with those of `count` new items after them.

    Args:
      new: theirs; None where nobody gave any: they count on, where the known ones are 0..N - 1.
      count: of new items.
      where: the new items come from, for the message.

    Raises:
      InputError: if one is known already, or none are given and they cannot be counted on.
    """
    if new is None and self.are_rows:
      return ItemIds.numbered(len(self) + count)
    if new is None:
      raise InputError(
        f"{where}: expected items.jsonl with the ids of the {count} new items, as the known ones have ids of their own"
        f' (such as {shown(str(self[0]))}), found none; write a line {{"id": "..."}} for each'
      )
    names = list(map(str, new.to_json()))
    known = self.rows(names)
    if np.any(known >= 0):
      first = int(np.argmax(known >= 0))
      raise InputError(
        f"{where}: expected new items, got {shown(names[first])} in row {first}, which is known already; leave it out"
      )
    return ItemIds([*map(str, self.to_json()), *names])

  def rows(self, ids: Iterable[str]) -> np.ndarray:
    """The rows [n] int64 of ids as text, -1 for unknown ones."""
    if self._names is None:
      numbers = np.array([_integer(one) for one in ids], np.int64)
      places = np.minimum(np.searchsorted(self._numbers, numbers), len(self) - 1)
      return np.where(self._numbers[places] == numbers, places, -1)
    if not self._rows:
      self._rows = {name: row for row, name in enumerate(self._names)}
    return np.array([self._rows.get(one, -1) for one in ids], np.int64)

  def require(self, ids: Sequence[str], *, where: Callable[[int], str]) -> np.ndarray:
    """The rows [n] int32 of ids as text.

    Args:
      ids: n of them.
      where: the place of the k-th, for the message.

    Raises:
      InputError: if one is unknown; says what ids there are, or the nearest ones.
    """
    rows = self.rows(ids)
    if np.any(rows < 0):
      first = int(np.argmax(rows < 0))
      raise InputError(
        f"{where(first)}: expected the id of an item, got {shown(ids[first])}; {self._nearest(ids[first])}"
      )
    return rows.astype(np.int32)

  def _nearest(self, unknown: str) -> str:
    """What may have been meant by an id that no item has."""
    if self.are_rows:
      return f"they are the integers from 0 to {len(self) - 1}"
    if self._names is None:
      return (
        f"they are {len(self)} of the integers from {self[0]} to {self[-1]}: data.drop_incomplete_items has left items"
        " out; leave this one out too"
      )
    return nearest(unknown, self._names)


def nearest(unknown: str, known: Sequence[str]) -> str:
  """Which of the ids that there are may have been meant by another, in words."""
  from rapidfuzz import fuzz, process

  found = process.extract(unknown, known, scorer=fuzz.ratio, processor=str.casefold, limit=3, score_cutoff=60)
  near = [shown(name) for name, _, _ in found]
  return f"the nearest are {', '.join(near)}" if near else f"they are written like {shown(known[0])}"


def _integer(text: str) -> int:
  """The value of 18 decimal digits at most, leading zeros aside; -1 for any other text."""
  digits = text.lstrip("0") or text[-1:]
  return int(digits) if digits.isascii() and digits.isdecimal() and len(digits) <= 18 else -1


def split_ids(text: str) -> list[str]:
  """The ids in "a,b,c", blanks around them aside; one with a comma stands in double quotes as in CSV, 'a,"b,c"'.

  Raises:
    csv.Error: if a quote is not closed.
  """
  (fields,) = csv.reader([text], skipinitialspace=True, strict=True)
  return [field.strip() for field in fields] or [""]
