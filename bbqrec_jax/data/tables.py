"""Data in memory: tables of pandas, polars or pyarrow, or dictionaries of columns, and arrays of features."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.directory import load_directory
from bbqrec_jax.data.features import LARGEST, check_name
from bbqrec_jax.data.files import check_label
from bbqrec_jax.data.interactions import Interactions, from_lengths, order_note
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.data.recbole import load_recbole
from bbqrec_jax.data.sources import MEMORY, recognise_source
from bbqrec_jax.errors import InputError, shown
from bbqrec_jax.utils.files import is_whole


def load_data(
  path: str | Path | None = None,
  *,
  interactions: Any = None,
  items: Any = None,
  features: Mapping[str, Any] | None = None,
  present: Mapping[str, Any] | None = None,
  name: str = "data in memory",
) -> Dataset:
  """A data set from a folder, or from tables and arrays in memory.

      data = bbqrec_jax.load_data("DIR")
      data = bbqrec_jax.load_data(interactions=df, items=items, features={"text": vectors})

  A table is whatever gives its columns by name: a DataFrame of pandas or polars, a LazyFrame, a table of pyarrow, a
  dictionary of lists. Ids are strings or whole numbers, and stay what they are.

  Args:
    path: a folder, or the URL of one, in the project's own format or RecBole's, in place of all the others.
    interactions: columns `user`, `item` and optionally `time` (seconds, or dates). A user's interactions are ordered by
      time, equal ones as in the table; without times, as in the table.
    items: columns `id` and optionally `title`, a row an item. Without it the items are those of the interactions.
    features: [N, D] numbers by modality, row k of item k of `items`.
    present: [N] bool by modality, which items have it; without it, an item has it unless its row is all zero.
    name: what to call the data in reports.

  Raises:
    InputError: if something is missing or wrong; names the table, column and row.
  """
  if path is not None:
    if not all(given is None for given in (interactions, items, features, present)):
      raise InputError("load_data: expected a folder or tables, got both")
    return {"directory": load_directory, "recbole": load_recbole}[recognise_source(path)](path)
  if interactions is None:
    raise InputError("load_data: expected a folder or interactions, got neither")
  # LazyFrames of polars.
  interactions, items = (table.collect() if hasattr(table, "collect") else table for table in (interactions, items))
  if features and items is None:
    raise InputError("load_data: expected items (a table with a column id) beside features, to say whose the rows are")
  ids = _ids(interactions, "item", table_name="interactions")
  named = list(dict.fromkeys(ids)) if items is None else _ids(items, "id", table_name="items")
  order, item_ids = _item_ids(named)
  titles = [""] * len(named) if items is None or not _has(items, "title") else _titles(items)
  if len(titles) != len(named):
    raise InputError(f"items: expected columns of one length, got {len(named)} ids and {len(titles)} titles")
  checked = {
    kind: _modality(kind, array, (present or {}).get(kind), num_items=len(named))
    for kind, array in (features or {}).items()
  }
  unknown = sorted((present or {}).keys() - checked.keys())
  if unknown:
    raise InputError(f"present: expected the modalities of features, got {', '.join(map(shown, unknown))} too")
  histories = _histories(interactions, ids, item_ids)
  return Dataset(
    name=name,
    source=MEMORY,
    interactions=histories,
    features={kind: array[order] for kind, (array, _) in checked.items()},
    present={kind: mask[order] for kind, (_, mask) in checked.items()},
    item_ids=item_ids,
    titles=tuple(titles[row] for row in order),
    notes=(order_note(histories).replace("file", "table"),),
  )


def _has(table: Any, column: str) -> bool:
  names = getattr(table, "column_names", None) or getattr(table, "columns", None)
  return column in list(table if names is None else names)


def _column(table: Any, column: str, *, name: str) -> np.ndarray:
  """A column of a table.

  Raises:
    InputError: if it is not there.
  """
  if not _has(table, column):
    raise InputError(f"{name}: expected a column {column!r}, found none; rename the one that it is")
  return np.asarray(table[column])


def _ids(table: Any, column: str, *, table_name: str) -> list[str | int]:
  """The ids in a column.

  Raises:
    InputError: if one is neither a whole number nor a string that can stand on a line.
  """
  ids = _column(table, column, name=table_name).tolist()
  for row, one in enumerate(ids):
    place = f"{table_name} row {row} column {column!r}"
    if type(one) is not int and not (isinstance(one, str) and one and "\n" not in one and is_whole(one)):
      raise InputError(f"{place}: expected an id, a string or a whole number, got {one!r}; fill it in or drop the row")
    if isinstance(one, str):
      check_label(one.encode(), where=place)
  if not ids:
    raise InputError(f"{table_name}: expected at least one row, got none")
  return ids


def _item_ids(ids: list[str | int]) -> tuple[np.ndarray, ItemIds]:
  """The rows in the order that items have, and their ids: numbers ascend, strings stay as they are.

  Raises:
    InputError: if an item is there twice.
  """
  first: dict[str, int] = {}
  for row, one in enumerate(ids):
    if first.setdefault(str(one), row) != row:
      raise InputError(f"items row {row} column 'id': expected each item once, got {one!r} again; drop one")
  if all(type(one) is int and abs(one) < 2**63 for one in ids):
    order = np.argsort(np.array(ids, np.int64))
    return order, ItemIds(np.array(ids, np.int64)[order])
  return np.arange(len(ids)), ItemIds(list(map(str, ids)))


def _titles(items: Any) -> list[str]:
  """The titles, "" where there is none."""
  return [
    one if isinstance(one, str) and is_whole(one) else "" for one in _column(items, "title", name="items").tolist()
  ]


def _modality(kind: str, array: Any, mask: Any, *, num_items: int) -> tuple[np.ndarray, np.ndarray]:
  """The features [N, D] and presence [N] of a modality.

  Raises:
    InputError: if the shape is another, a number that counts is not finite, or no item has it.
  """
  place = f"features[{kind!r}]"
  check_name(kind, where="features")
  values = np.asarray(array)
  if values.dtype.kind not in "fiu" or values.ndim != 2 or len(values) != num_items or not values.size:
    raise InputError(
      f"{place}: expected numbers [{num_items}, width], a row for each item, got {values.dtype} {list(values.shape)}"
    )
  values = values if values.dtype.kind == "f" and values.dtype.itemsize <= 8 else values.astype(np.float32)
  here = np.any(values, axis=1) if mask is None else np.asarray(mask)
  if here.dtype != bool or here.shape != (num_items,):
    raise InputError(f"present[{kind!r}]: expected [{num_items}] bool, got {here.dtype} {list(here.shape)}")
  wrong = np.flatnonzero(here & ~np.all(np.abs(values) <= LARGEST, axis=1))
  if len(wrong):
    raise InputError(
      f"{place} row {wrong[0]}: expected finite float32 numbers; write zeros if the item lacks the modality"
    )
  if not here.any():
    raise InputError(f"{place}: expected features of some items, got none; leave this modality out")
  return values, here


def _histories(table: Any, ids: list[str | int], item_ids: ItemIds) -> Interactions:
  """The interactions, ordered.

  Raises:
    InputError: if an item is unknown, the columns differ in length, or a time is no number.
  """
  users = list(map(str, _ids(table, "user", table_name="interactions")))
  rows = item_ids.require(list(map(str, ids)), where=lambda place: f"interactions row {place} column 'item'")
  if len(users) != len(rows):
    raise InputError(f"interactions: expected columns of one length, got {len(users)} users and {len(rows)} items")
  number = {user: place for place, user in enumerate(dict.fromkeys(users))}
  user_rows = np.array([number[user] for user in users])
  keys, times = [user_rows], None
  if _has(table, "time"):
    times = _seconds(_column(table, "time", name="interactions"), count=len(rows))
    keys.insert(0, times)
  order = np.lexsort(keys)  # Stable: equal ones stay as they are.
  lengths = np.bincount(user_rows, minlength=len(number))
  return from_lengths(rows[order], lengths, np.array(list(number), str), None if times is None else times[order])


def _seconds(column: np.ndarray, *, count: int) -> np.ndarray:
  """Seconds [n] float64 of a column of numbers or dates.

  Raises:
    InputError: if one is neither.
  """
  try:
    if column.dtype.kind not in "fiu":  # Dates, those with a time zone among them.
      dates = column.astype("datetime64[us]")
      column = np.where(np.isnat(dates), np.nan, dates.astype(np.int64) / 1e6)
    seconds = column.astype(np.float64)
  except (TypeError, ValueError):
    seconds = np.full(count, np.nan)
  if seconds.shape != (count,) or not np.isfinite(seconds).all():
    row = int(np.argmin(np.isfinite(seconds))) if len(seconds) else 0
    raise InputError(
      f"interactions row {row} column 'time': expected seconds, or a date, of each interaction; fill it in, or leave"
      " the column out to keep the order of the table"
    )
  return seconds
