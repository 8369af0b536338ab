"""The project's own format: a folder of `sequences.txt`, `items.jsonl.gz` and `<modality>_features.npy`."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.features import load_modalities, unused_files
from bbqrec_jax.data.files import check_label, read_lines, require_folder
from bbqrec_jax.data.interactions import Interactions, check_history_lengths, from_lengths
from bbqrec_jax.data.times import in_seconds, time_notes
from bbqrec_jax.errors import InputError, shown
from bbqrec_jax.input_files import is_given


def load_directory(path: str | Path, *, modalities: Iterable[str] = (), drop_short_users: bool = False) -> Dataset:
  """Reads and checks a folder.

  - `sequences.txt`: a line a user, `user item item ...`, separated by blanks; ids from 0, in time order.
  - `timestamps.txt`, optional: the same lines with the second of each interaction in place of its item; other units
    are recognised, see `times.unit_of`.
  - `items.jsonl.gz` or `items.jsonl`: line k is the JSON object of item k; its `title` is used, and its `id`, if there
    is one, must be k. The number of lines is N.
  - `<modality>_features.npy` [N, D] float, row k is item k, and optionally `has_<modality>.npy` [N], see
    `features.load_modality`.

  Args:
    path: the folder.
    modalities: names, in order; empty for all that are found, by name.
    drop_short_users: drop the users with fewer than 3 interactions rather than refuse them.

  Raises:
    InputError: if anything is missing or wrong.
  """
  folder = require_folder(path)
  sequences = folder / "sequences.txt"
  if not is_given(sequences):
    hint = "; --config.data.source=recbole reads the .inter file there" if any(folder.glob("*.inter")) else ""
    raise InputError(f"{folder}: expected sequences.txt ('user item item ...' lines), found no such file{hint}")
  titles = read_titles(folder)
  whole = read_sequences(sequences, num_items=len(titles))
  times, unit = folder / "timestamps.txt", "seconds"
  if is_given(times):
    seconds, unit = in_seconds(read_timestamps(times, whole), where=time_places(times, whole))
    whole = dataclasses.replace(whole, times=seconds)
  interactions = check_history_lengths(whole, path=sequences, drop_short=drop_short_users)
  features, present = load_modalities(folder, modalities, num_items=len(titles))
  notes = (*time_notes(interactions, unit), *unused_files(folder, features, (sequences.name, times.name)))
  return Dataset(folder.resolve().name, str(path), interactions, features, present, titles, notes, unit)


def read_titles(folder: Path) -> tuple[str, ...]:
  """The titles of the items of `items.jsonl.gz` or `items.jsonl`, "" where there is none.

  Raises:
    InputError: if neither file is there, or both, or none holds an item, or a line is not what it should be.
  """
  names = ("items.jsonl.gz", "items.jsonl")
  found = [folder / name for name in names if is_given(folder / name)]
  if len(found) != 1:
    came = "both; remove one" if found else "neither; write a line for each item, {} is enough"
    raise InputError(f"{folder}: expected one of {' and '.join(names)} (line k describes item k), found {came}")
  (path,) = found
  titles = []
  for row, line in enumerate(read_lines(path)):
    place = f"{path} line {row + 1}"
    try:
      record = json.loads(line.decode())
    except (ValueError, RecursionError):
      raise InputError(f"{place}: expected a JSON object, got {shown(line)}; write one object a line") from None
    if not isinstance(record, dict):
      raise InputError(f"{place}: expected a JSON object, got {shown(line)}; write one object a line")
    if record.get("id", row) != row:
      raise InputError(
        f"{place} field 'id': expected {row}, the item of this line, got {_shown_json(record['id'])}; sort the file by"
        " id, or leave the field out"
      )
    title = "" if record.get("title") is None else record["title"]
    if not isinstance(title, str) or not _is_whole(title):
      raise InputError(
        f"{place} field 'title': expected a string of whole characters, got {_shown_json(title)}; correct it or leave"
        " it out"
      )
    titles.append(title)
  if not titles:
    raise InputError(f"{path}: expected at least one item, got an empty file; write one JSON object for each item")
  return tuple(titles)


def _is_whole(text: str) -> bool:
  """Whether the text can be written: JSON can escape half of a surrogate pair, which is no character."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def _shown_json(value: Any) -> str:
  """A JSON value as an error message quotes it; of a list or object, which may be nested without end, only the kind."""
  return type(value).__name__ if isinstance(value, list | dict) else shown(json.dumps(value))


def read_sequences(path: Path, *, num_items: int) -> Interactions:
  """The histories of `sequences.txt`.

  Args:
    path: the file.
    num_items: N.

  Raises:
    InputError: if a line is empty, lacks its user or items, or repeats a user, a user's label is longer than 256 bytes,
      or an item is not an integer in 0..N-1.
  """
  lines = read_lines(path)
  labels, tails = [], []
  lengths = np.empty(len(lines), np.int64)
  for row, line in enumerate(lines):
    fields = line.split()
    if len(fields) < 2 or not line.startswith(fields[0]):
      raise InputError(
        f"{path} line {row + 1}: expected 'user item item ...', got {shown(line)}; "
        + ("give the user items or remove the line" if fields else "remove the line")
      )
    labels.append(fields[0])
    tails.append(line[len(fields[0]) :])
    lengths[row] = len(fields) - 1
  tail = b"".join(tails)
  # Nothing but digits and blanks is left, so the fast parser can neither stop early nor read a sign or a fraction.
  if tail.translate(None, b"0123456789 \t\r\v\f"):
    _refuse_items(path, lines, num_items)
  items = np.fromstring(tail.decode("ascii"), dtype=np.int64, sep=" ")
  if np.any(items >= num_items):
    _refuse_items(path, lines, num_items)
  if labels:
    longest = max(range(len(labels)), key=lambda row: len(labels[row]))
    check_label(labels[longest], where=f"{path} line {longest + 1} field 1")
  if len(set(labels)) < len(labels):
    first: dict[bytes, int] = {}
    for row, label in enumerate(labels):
      if first.setdefault(label, row) != row:
        raise InputError(
          f"{path} line {row + 1} field 1: expected each user on one line, got {shown(label)} again (first on line"
          f" {first[label] + 1}); join the two lines in time order"
        )
  return from_lengths(items, lengths, np.array([label.decode() for label in labels], str))


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
      f"{path}: expected {interactions.num_users} lines, one for each of sequences.txt, got {len(lines)}; write the"
      " same users in the same order"
    )
  times = np.empty(interactions.num_interactions, np.float64)
  for row, line in enumerate(lines):
    label, *fields = line.split() or [b""]
    place, user = f"{path} line {row + 1}", str(interactions.users[row])
    if label.decode(errors="replace") != user:
      raise InputError(
        f"{place} field 1: expected user {user!r} as in sequences.txt, got {shown(label)}; keep its order"
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


def _refuse_items(path: Path, lines: list[bytes], num_items: int) -> NoReturn:
  for row, line in enumerate(lines):
    for field, token in enumerate(line.split()[1:], start=2):
      digits = token.lstrip(b"0") or b"0"
      if not token.isdigit():
        mend = "number the items from 0 and separate them by blanks, or use --config.data.source=recbole"
      elif len(digits) > 18 or int(digits) >= num_items:
        mend = "number the items from 0, or add the item to the items file"
      else:
        continue
      raise InputError(
        f"{path} line {row + 1} field {field}: expected an item id, an integer in 0..{num_items - 1}, got"
        f" {shown(token)}; {mend}"
      )
  raise AssertionError("a check of the whole file failed that no line fails")
