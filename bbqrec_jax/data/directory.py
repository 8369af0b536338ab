"""The project's own format: a folder of `sequences.txt`, `items.jsonl.gz` and `<modality>_features.npy`."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.encoding.store import made
from bbqrec_jax.data.features import load_modalities, unused_files
from bbqrec_jax.data.files import check_label, read_lines, require_folder, separator_of
from bbqrec_jax.data.interactions import Interactions, from_lengths, require_users
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.data.times import in_seconds, time_notes
from bbqrec_jax.errors import InputError, printable, shown
from bbqrec_jax.utils.files import is_given, is_whole

_ITEM_FILES = ("items.jsonl.gz", "items.jsonl")


def load_directory(path: str | Path, *, modalities: Iterable[str] = ()) -> Dataset:
  """Reads and checks a folder.

  - `sequences.txt`: a line a user, `user item item ...`, separated by blanks; ids from 0, in time order.
  - `users.txt`, optional: line k is the id of the user of line k of `sequences.txt`, in place of the one there.
  - `timestamps.txt`, optional: the same lines with the second of each interaction in place of its item; other units
    are recognised, see `times.unit_of`.
  - `items.jsonl.gz` or `items.jsonl`: line k is the JSON object of item k; its `title` is used, and its `id`: a string
    of its own, in every line, or k. The number of lines is N.
  - `<modality>_features.npy` [N, D] float, row k is item k, and optionally `has_<modality>.npy` [N], see
    `features.load_modality`.

  Args:
    path: the folder.
    modalities: names, in order; empty for all that are found, by name.

  Raises:
    InputError: if anything is missing or wrong.
  """
  folder = require_folder(path)
  sequences = folder / "sequences.txt"
  if not is_given(sequences):
    hint = "; --config.data.source=recbole reads the .inter file there" if any(folder.glob("*.inter*")) else ""
    raise InputError(f"{folder}: expected sequences.txt ('user item item ...' lines), found no such file{hint}")
  item_ids, titles = read_items(folder)
  whole = read_sequences(sequences, num_items=len(titles), of_folder=True)
  times, unit = folder / "timestamps.txt", "seconds"
  if is_given(times):
    seconds, unit = in_seconds(read_timestamps(times, whole), where=time_places(times, whole))
    whole = dataclasses.replace(whole, times=seconds)
  users = folder / "users.txt"
  if is_given(users):
    whole = dataclasses.replace(whole, users=read_user_ids(users, count=whole.num_users))
  interactions = require_users(whole, path=sequences)
  features, present = load_modalities(folder, modalities, num_items=len(titles))
  notes = (
    *time_notes(interactions, unit),
    *_origins(folder, features),
    *unused_files(folder, features, (sequences.name, times.name, users.name)),
  )
  item_ids = item_ids or ItemIds.numbered(len(titles))
  return Dataset(folder.resolve().name, str(path), interactions, features, present, item_ids, titles, notes, unit)


def _origins(folder: Path, modalities: Iterable[str]) -> Iterator[str]:
  """How the features were made, where `bbqrec features` made them, as sentences."""
  noted = made(folder)
  for name in modalities:
    note = noted.get(name)
    if isinstance(note, dict):
      yield printable(f"{name} features by {note.get('made_by')}, fingerprint {note.get('fingerprint')}")


def has_items(folder: Path) -> bool:
  """Whether there is an `items.jsonl.gz` or `items.jsonl`."""
  return any(is_given(folder / name) for name in _ITEM_FILES)


def read_items(folder: Path, *, first: int = 0) -> tuple[ItemIds | None, tuple[str, ...]]:
  """What `items.jsonl.gz` or `items.jsonl` says of the items.

  Args:
    folder: where it is.
    first: the number of the item in its first line.

  Returns:
    Their own ids, None where the lines have none (or only say the number of their item), and their titles, "" where
    there is none.

  Raises:
    InputError: if neither file is there, or both, or none holds an item, or a line is not what it should be.
  """
  found = [folder / name for name in _ITEM_FILES if is_given(folder / name)]
  if len(found) != 1:
    came = "both; remove one" if found else "neither; write a line for each item, {} is enough"
    raise InputError(f"{folder}: expected one of {' and '.join(_ITEM_FILES)} (line k describes item k), found {came}")
  (path,) = found
  ids: dict[str, int] = {}
  titles = []
  for row, line in enumerate(read_lines(path)):
    place = f"{path} line {row + 1}"
    try:
      record = json.loads(line.decode())
    except (ValueError, RecursionError):
      raise InputError(f"{place}: expected a JSON object, got {shown(line)}; write one object a line") from None
    if not isinstance(record, dict):
      raise InputError(f"{place}: expected a JSON object, got {shown(line)}; write one object a line")
    own = record.get("id")
    if isinstance(own, str):
      _check_own_id(own, ids, place=place)
      ids[own] = row
    elif own is not None and (type(own) is not int or own != first + row):
      raise InputError(
        f"{place} field 'id': expected {first + row}, the item of this line, or a string, got {_shown_json(own)}; write"
        " ids of your own as strings, sort the file by id, or leave the field out"
      )
    if len(ids) not in (0, row + 1):
      raise InputError(
        f"{place} field 'id': expected an id of their own for all items or for none, got {_shown_json(own)} here and"
        " another kind before it; write each as a string"
      )
    title = "" if record.get("title") is None else record["title"]
    if not isinstance(title, str) or not is_whole(title):
      raise InputError(
        f"{place} field 'title': expected a string of whole characters, got {_shown_json(title)}; correct it or leave"
        " it out"
      )
    titles.append(title)
  if not titles:
    raise InputError(f"{path}: expected at least one item, got an empty file; write one JSON object for each item")
  return ItemIds(list(ids)) if ids else None, tuple(titles)


def read_new_items(folder: Path, known: ItemIds, *, count: int) -> tuple[ItemIds, tuple[str, ...]]:
  """What the optional `items.jsonl` beside the features of new items says of them.

  Args:
    folder: of the new items' features.
    known: the ids of the known items.
    count: of new items.

  Returns:
    The ids of the known and the new items, which count on where they are numbers; and the new ones' titles.

  Raises:
    InputError: as `read_items` and `ItemIds.extended`, or if it is of more or fewer items.
  """
  new, titles = read_items(folder, first=len(known)) if has_items(folder) else (None, ("",) * count)
  if len(titles) != count:
    raise InputError(f"{folder}: expected items.jsonl to have {count} lines, one for each row, got {len(titles)}")
  return known.extended(new, count, where=folder), titles


def _check_own_id(own: str, known: Mapping[str, int], *, place: str) -> None:
  """Refuses the id of an item that another has, or that could not stand in a line of text.

  Raises:
    InputError: if that is so.
  """
  if not own or not is_whole(own) or "\n" in own:
    raise InputError(
      f"{place} field 'id': expected whole characters on one line, got {_shown_json(own)}; write it as in your own data"
    )
  check_label(own.encode(), where=f"{place} field 'id'")
  if own in known:
    raise InputError(
      f"{place} field 'id': expected each item once, got {shown(own)} again (first on line"
      f" {known[own] + 1}); remove one"
    )


def _shown_json(value: Any) -> str:
  """A JSON value as an error message quotes it; of a list or object, which may be nested without end, only the kind."""
  return type(value).__name__ if isinstance(value, list | dict) else shown(json.dumps(value))


def read_users(path: Path) -> tuple[np.ndarray, list[bytes], np.ndarray]:
  """The lines 'user item item ...' of a file.

  Returns:
    The users' labels [U] str, and of each the rest of the line and how many items that has, [U] int64.

  Raises:
    InputError: if a line is empty, lacks its user or items, or repeats a user, or a user's label is longer than 256
      bytes.
  """
  lines = read_lines(path)
  labels: dict[bytes, int] = {}
  tails = []
  lengths = np.empty(len(lines), np.int64)
  for row, line in enumerate(lines):
    fields = line.split()
    if len(fields) < 2 or not line.startswith(fields[0]):
      separator = separator_of(line.replace(b"\t", b" "), expected="blanks")
      mend = "give the user items or remove the line" if fields else "remove the line"
      mend = f"separate them by blanks instead of {separator}" if separator else mend
      raise InputError(f"{path} line {row + 1}: expected 'user item item ...', got {shown(line)}; {mend}")
    label = fields[0]
    check_label(label, where=f"{path} line {row + 1} field 1")
    if labels.setdefault(label, row) != row:
      raise InputError(
        f"{path} line {row + 1} field 1: expected each user on one line, got {shown(label)} again (first on line"
        f" {labels[label] + 1}); join the two lines in time order"
      )
    tails.append(line[len(label) :])
    lengths[row] = len(fields) - 1
  return np.array([label.decode() for label in labels], str), tails, lengths


def read_user_ids(path: Path, *, count: int) -> np.ndarray:
  """The ids [count] str of users, a line each, which may hold blanks.

  Raises:
    InputError: if there are more or fewer, or one is empty, longer than 256 bytes, or there twice.
  """
  lines = read_lines(path)
  if len(lines) != count:
    raise InputError(f"{path}: expected {count} lines, one for each line of sequences.txt, got {len(lines)}")
  first: dict[bytes, int] = {}
  for row, line in enumerate(lines):
    check_label(line, where=f"{path} line {row + 1}")
    blank = not line.decode().strip()
    if blank or first.setdefault(line, row) != row:
      came = "a blank line" if blank else f"{shown(line)} again (first on line {first[line] + 1})"
      raise InputError(f"{path} line {row + 1}: expected the id of a user, each once, got {came}; correct it")
  return np.array([line.decode() for line in lines], str)


def read_sequences(path: Path, *, num_items: int, of_folder: bool = False) -> Interactions:
  """The histories of `sequences.txt`.

  Args:
    path: the file.
    num_items: N.
    of_folder: whether it is that of a data set, which could have been given in another way.

  Raises:
    InputError: as `read_users`, or if an item is not an integer in 0..N-1.
  """
  users, tails, lengths = read_users(path)
  tail = b"".join(tails)
  # Nothing but digits and blanks is left, so the fast parser can neither stop early nor read a sign or a fraction.
  if tail.translate(None, b"0123456789 \t\r\v\f"):
    _refuse_items(path, tails, num_items, of_folder=of_folder)
  items = np.fromstring(tail.decode("ascii"), dtype=np.int64, sep=" ")
  if np.any(items >= num_items):
    _refuse_items(path, tails, num_items, of_folder=of_folder)
  return from_lengths(items, lengths, users)


def read_timestamps(path: Path, interactions: Interactions) -> np.ndarray:
  """The times of interactions, from a file with the lines of `sequences.txt` and a number in place of each item.

  Args:
    path: the file.
    interactions: what `sequences.txt` holds.

  Returns:
    [total] float64, in the unit of the file.

  Raises:
    InputError: if a line is another user's, has more or fewer numbers than the user has items, or they are not finite
      and in time order.
  """
  lines = read_lines(path)
  if len(lines) != interactions.num_users:
    raise InputError(
      f"{path}: expected {interactions.num_users} lines, one for each user's history, got {len(lines)}; write the same"
      " users in the same order"
    )
  times = np.empty(interactions.num_interactions, np.float64)
  for row, line in enumerate(lines):
    label, *fields = line.split() or [b""]
    place, user = f"{path} line {row + 1}", str(interactions.users[row])
    if label.decode(errors="replace") != user:
      raise InputError(
        f"{place} field 1: expected user {user!r} as in the histories, got {shown(label)}; keep their order"
      )
    first, last = interactions.offsets[row : row + 2]
    if len(fields) != last - first:
      raise InputError(f"{place}: expected {last - first} times, one for each item, got {len(fields)}; correct it")
    try:
      values = np.array(fields, np.float64)
    except ValueError:
      values = np.full(len(fields), np.nan)
    if b"_" in b" ".join(fields) or not np.isfinite(values).all() or np.any(values[1:] < values[:-1]):
      raise InputError(f"{place}: expected finite numbers in time order, got {shown(line)}; sort the history by time")
    times[first:last] = values
  return times


def time_places(path: Path, interactions: Interactions) -> Callable[[int], str]:
  """Which line of a file of times each of `read_timestamps` is on, by its index."""
  return lambda index: f"{path} line {np.searchsorted(interactions.offsets, index, side='right')}"


def _refuse_items(path: Path, tails: list[bytes], num_items: int, *, of_folder: bool) -> NoReturn:
  for row, tail in enumerate(tails):
    for field, token in enumerate(tail.split(), start=2):
      digits = token.lstrip(b"0") or b"0"
      if not token.isdigit():
        other = ", or use --config.data.source=recbole" if of_folder else ""
        mend = f"number the items from 0 and separate them by blanks{other}"
      elif len(digits) > 18 or int(digits) >= num_items:
        other = ", or add the item to the items file" if of_folder else ""
        mend = f"number the items from 0{other}"
      else:
        continue
      raise InputError(
        f"{path} line {row + 1} field {field}: expected an item id, an integer in 0..{num_items - 1}, got"
        f" {shown(token)}; {mend}"
      )
  raise AssertionError("a check of the whole file failed that no line fails")
