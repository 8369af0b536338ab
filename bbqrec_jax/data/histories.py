"""Histories that somebody asks about, by the ids of the data that a model was trained on."""

import json
from pathlib import Path

import numpy as np

from bbqrec_jax.data.directory import read_sequences, read_users
from bbqrec_jax.data.files import check_label, read_lines
from bbqrec_jax.data.interactions import Interactions, from_lengths
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.errors import InputError, shown
from bbqrec_jax.utils.files import is_whole


def read_histories(path: Path, item_ids: ItemIds) -> Interactions:
  """The histories of a file, a line a user.

  Args:
    path: of lines 'user item item ...'; or, where its name ends in `.jsonl` or `.jsonl.gz`, of objects
      `{"user": ..., "items": [...]}`, for ids with blanks in them; or a `.parquet` file with these columns.
    item_ids: of the catalogue.

  Raises:
    InputError: if the file holds no user, a line is something else, a user is there twice, or no item has such an id.
  """
  in_json = path.name.endswith((".jsonl", ".jsonl.gz", ".parquet"))
  if path.name.endswith(".parquet"):
    users, histories = _read_parquet(path)
  elif in_json:
    users, histories = _read_json_lines(path)
  elif item_ids.are_rows:
    return _require_users(path, read_sequences(path, num_items=len(item_ids)))
  else:
    users, tails, _ = read_users(path)
    histories = [[token.decode() for token in tail.split()] for tail in tails]
  lengths = np.array([len(history) for history in histories], np.int64)
  ends = np.cumsum(lengths)

  def where(number: int) -> str:
    row = int(np.searchsorted(ends, number, side="right"))
    place = int(number - (ends[row] - lengths[row]))
    return f"{path} line {row + 1} " + (f"item {place + 1}" if in_json else f"field {place + 2}")

  items = item_ids.require([item for history in histories for item in history], where=where)
  return _require_users(path, from_lengths(items, lengths, users))


def _require_users(path: Path, histories: Interactions) -> Interactions:
  if not histories.num_users:
    raise InputError(f"{path}: expected a line a user, 'user item item ...', got an empty file")
  return histories


def _read_json_lines(path: Path) -> tuple[np.ndarray, list[list[str]]]:
  """The users [U] str and their items, as text, of a file of JSON objects."""
  histories: dict[str, list[str]] = {}
  for row, line in enumerate(read_lines(path)):
    place = f"{path} line {row + 1}"
    try:
      record = json.loads(line.decode())
      user, items = record["user"], record["items"]
      known = all(_is_id(value) for value in (user, *items)) and isinstance(items, list) and items
    except (ValueError, RecursionError, TypeError, KeyError):
      known = False
    if not known:
      raise InputError(
        f'{place}: expected {{"user": id, "items": [id, ...]}}, ids being strings or integers and at least one item'
        f" there, got {shown(line)}; correct it"
      )
    check_label(str(user).encode(), where=f"{place} field 'user'")
    if str(user) in histories:
      raise InputError(f"{place} field 'user': expected each user once, got {shown(str(user))} again; join the lines")
    histories[str(user)] = list(map(str, items))
  return np.array(list(histories), str), list(histories.values())


def _read_parquet(path: Path) -> tuple[np.ndarray, list[list[str]]]:
  """The users [U] str and their items, as text, of a Parquet file with columns `user` and `items`, a list."""
  import pyarrow as pa
  import pyarrow.parquet

  try:
    table = pyarrow.parquet.read_table(path)
    columns = {name: table[name].to_pylist() for name in table.column_names if name in ("user", "items")}
  except (pa.ArrowException, OSError, ValueError, KeyError) as error:  # A column twice is a KeyError.
    raise InputError(f"{path}: expected a Parquet file, could not read one ({error}); write it again") from None
  if len(columns) < 2:
    raise InputError(
      f"{path}: expected columns user and items (a list), got {', '.join(table.column_names)}; name them so"
    )
  histories: dict[str, list[str]] = {}
  for row, (user, items) in enumerate(zip(columns["user"], columns["items"], strict=True), start=1):
    if not isinstance(items, list) or not items or not all(_is_id(value) for value in (user, *items)):
      raise InputError(
        f"{path} line {row}: expected a user and a list of items, ids being strings or integers, got {shown(str(user))}"
        f" and {shown(str(items))}; correct it"
      )
    check_label(str(user).encode(), where=f"{path} line {row} field 'user'")
    if str(user) in histories:
      raise InputError(
        f"{path} line {row} field 'user': expected each user once, got {shown(str(user))} again; join them"
      )
    histories[str(user)] = list(map(str, items))
  return np.array(list(histories), str), list(histories.values())


def _is_id(value: object) -> bool:
  return is_whole(value) if isinstance(value, str) else type(value) is int
