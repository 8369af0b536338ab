"""RecBole's atomic files: a folder of one `.inter` table and, optionally, one `.item` table."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.features import LARGEST, load_modalities, spread, suits_float32, unused_files
from bbqrec_jax.data.files import check_growth, check_label, read_lines, read_text, require_folder, separator_of
from bbqrec_jax.data.interactions import Interactions, from_lengths, require_users
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.data.preparation.columns import ITEMS
from bbqrec_jax.data.times import in_seconds, time_notes
from bbqrec_jax.errors import InputError, printable, shown

_TELLING = {
  name for kind in ("description", "brand", "category", "price") for name in ITEMS[kind].replace("_", "").split()
} | {"movie_title", "genre", "categories", "sales_type"}

TITLE_COLUMNS = ("title", "item_name", "movie_title", "name")


def load_recbole(path: str | Path, *, modalities: Iterable[str] = ()) -> Dataset:
  """Reads and checks a folder of RecBole's atomic files: tab-separated, the first line names columns as `name:type`.

  - `*.inter`: `user_id:token`, `item_id:token` and optionally `timestamp:float`. A user's interactions are ordered by
    timestamp, equal ones as in the file; without timestamps, as in the file, and a note warns of a column that seems to
    be one by another name. Timestamps are seconds; other units are recognised, see `times.unit_of`. Repeated
    interactions are kept.
  - `*.item`, optional: `item_id:token`; item k is the table's row k, and its id the token. A column `title`,
    `item_name`, `movie_title` or `name` gives the titles; every `float_seq` column is a modality, named without a
    trailing `_features`, `_feature` or `_emb`; an empty cell means that the item lacks it. Without the table, items
    have the order in which they first appear in `.inter`.
  - Either table may be compressed: `.inter.gz`, `.item.gz`.
  - `<modality>_features.npy` and `has_<modality>.npy`, rows in that order, see `features.load_modality`.

  Args:
    path: the folder.
    modalities: names, in order; empty for all that are found, by name.

  Raises:
    InputError: if anything is missing or wrong.
  """
  folder = require_folder(path)
  inter_path = _only_file(folder, "inter")
  if inter_path is None:
    has_sequences = (folder / "sequences.txt").exists()
    hint = "give the folder that holds NAME.inter, or make a data set of another log with bbqrec prepare"
    if has_sequences:
      hint = "--config.data.source=directory reads the sequences.txt there"
    raise InputError(f"{folder}: expected one .inter file, found none; {hint}")
  item_path = _only_file(folder, "item")
  tables: dict[str, np.ndarray] = {}
  tokens: list[bytes] | None = None
  unread: list[str] = []
  titles: tuple[str, ...] = ()
  if item_path is not None:
    tokens, titles, tables, unread = _read_items(item_path)
  interactions, tokens, unit, warnings = _read_interactions(inter_path, tokens, item_path)
  interactions = require_users(interactions, path=inter_path)
  features, present = load_modalities(folder, modalities, num_items=len(tokens), in_tables=tables)
  name = inter_path.name.removesuffix(".gz").removesuffix(".inter")
  notes = (*time_notes(interactions, unit), *warnings, *_unread(item_path, unread), *unused_files(folder, features))
  item_ids = ItemIds([token.decode() for token in tokens])
  titles = titles or ("",) * len(tokens)
  return Dataset(name, str(path), interactions, features, present, item_ids, titles, notes, unit)


def _only_file(folder: Path, suffix: str) -> Path | None:
  paths = sorted([*folder.glob(f"*.{suffix}"), *folder.glob(f"*.{suffix}.gz")])
  if len(paths) > 1:
    raise InputError(
      f"{folder}: expected one .{suffix} file, found {', '.join(path.name for path in paths)}; keep one, and give each"
      " data set a folder of its own"
    )
  return paths[0] if paths else None


def _read_header(path: Path, header: bytes, required: Iterable[str]) -> dict[str, str]:
  """The types of the columns by name, in order."""
  columns: dict[str, str] = {}
  separator = separator_of(header, expected="tabs")
  if separator:
    raise InputError(
      f"{path} line 1: expected columns name:type separated by tabs, got {separator} in {shown(header)}; write tabs"
      " between the fields of all lines, and a header as user_id:token, item_id:token (RecBole's atomic files)"
    )
  for field, column in enumerate(header.decode().split("\t"), start=1):
    name, _, kind = column.partition(":")
    if not name or not kind:
      raise InputError(
        f"{path} line 1 field {field}: expected a tab-separated header of name:type, got {shown(column)}; give each"
        " column its type, as user_id:token, item_id:token, timestamp:float (RecBole's atomic files)"
      )
    if name in columns:
      raise InputError(f"{path} line 1 field {field}: expected each column once, got {shown(name)} again; remove one")
    columns[name] = kind
  for name in required:
    if columns.get(name) != "token":
      raise InputError(f"{path} line 1: expected a column {name}:token, got {shown(header)}; add or rename it")
  return columns


def _refuse_field_count(path: Path, line: int, expected: int, got: int, text: bytes = b"") -> InputError:
  separator = separator_of(text, expected="tabs")
  came = f"{got}, and {separator} in {shown(text)}" if separator else str(got)
  return InputError(
    f"{path} line {line}: expected {expected} tab-separated fields as in the header, got {came}; correct the line"
  )


def _read_interactions(
  path: Path, item_tokens: list[bytes] | None, item_path: Path | None
) -> tuple[Interactions, list[bytes], str, tuple[str, ...]]:
  """Reads `.inter`.

  Returns:
    The interactions, the tokens of the N items, the unit of the times, and warnings.
  """
  content = read_text(path)
  columns = _read_header(path, content[: content.find(b"\n")], ("user_id", "item_id"))
  places = {name: place for place, name in enumerate(columns)}
  starts, ends = _locate_fields(path, content, len(columns))

  def column(name: str) -> Iterator[np.ndarray]:
    return _column(path, name, content, starts[:, places[name]], ends[:, places[name]])

  users, user_rows = _number([token for block in column("user_id") for token in block.tolist()])
  items = [token for block in column("item_id") for token in block.tolist()]
  for name, tokens in (("user_id", users), ("item_id", items)):
    if b"" in tokens:
      line = int(np.argmax(starts[:, places[name]] == ends[:, places[name]])) + 2
      raise InputError(f"{path} line {line} field '{name}': expected a token, got an empty field; fill it in")
  if item_tokens is None:
    item_tokens, item_rows = _number(items)
  else:
    index = {token: item for item, token in enumerate(item_tokens)}
    item_rows = np.fromiter(map(index.get, items, itertools.repeat(-1)), np.int64, len(items))
    if np.any(item_rows < 0):
      row = int(np.argmax(item_rows < 0))
      raise InputError(
        f"{path} line {row + 2} field 'item_id': expected an item of {item_path}, got {shown(items[row])}; add it there"
      )
  keys, times, unit = [user_rows], None, "seconds"
  if "timestamp" in columns:
    read = _timestamps(path, column("timestamp"))
    times, unit = in_seconds(read, where=lambda row: f"{path} line {row + 2} field 'timestamp'")
    keys.insert(0, times)
  order = np.lexsort(keys)  # By user, then by timestamp, then as in the file: the sort is stable.
  lengths = np.bincount(user_rows, minlength=len(users))
  labels = np.array([user.decode() for user in users], str)
  times = None if times is None else times[order]
  interactions = from_lengths(item_rows[order], lengths, labels, times)
  return interactions, item_tokens, unit, _time_warning(path, columns)


def _time_warning(path: Path, columns: Mapping[str, str]) -> tuple[str, ...]:
  """A note on columns that may hold the times of interactions, where none is called so."""
  alike = [f"{name}:{kind}" for name, kind in columns.items() if "time" in name.lower() or "date" in name.lower()]
  if "timestamp" in columns or not alike:
    return ()
  return (
    f"warning: {path.name} has {printable(', '.join(alike))} and no timestamp:float; if that says when, rename it to"
    " timestamp:float (a number, such as seconds), or histories may be out of order and tell of their future",
  )


def _locate_fields(path: Path, content: bytes, num_fields: int) -> tuple[np.ndarray, np.ndarray]:
  """Where each field of each row after the header starts and ends in the file, both [rows, fields] int64."""
  body = content.find(b"\n") + 1
  data = np.frombuffer(content, np.uint8)[body:]
  separators = np.flatnonzero((data == ord("\t")) | (data == ord("\n")))
  row_ends = np.flatnonzero(data[separators] == ord("\n"))
  counts = np.diff(row_ends, prepend=-1)
  if np.any(counts != num_fields):
    row = int(np.argmax(counts != num_fields))
    text = data[separators[row_ends[row - 1]] + 1 if row else 0 : separators[row_ends[row]]].tobytes()
    raise _refuse_field_count(path, row + 2, num_fields, int(counts[row]), text)
  ends = separators + body
  starts = np.append(body, ends + 1)[: len(ends)]
  return starts.reshape(-1, num_fields), ends.reshape(-1, num_fields)


# Rows whose tokens are gathered at once, all as wide as the longest.
_ROWS = 2**17


def _column(path: Path, name: str, content: bytes, starts: np.ndarray, ends: np.ndarray) -> Iterator[np.ndarray]:
  """The tokens between starts and ends [rows], as bytes, gathered a character position at a time, not a row at a time.

  Yields:
    Those of a block of rows, [n].

  Raises:
    InputError: if a token is too long for an array of them.
  """
  data = np.frombuffer(content, np.uint8)
  if len(starts):
    longest = int(np.argmax(ends - starts))
    check_label(content[starts[longest] : ends[longest]], where=f"{path} line {longest + 2} field '{name}'")
  for first in range(0, len(starts), _ROWS):
    start = starts[first : first + _ROWS]
    lengths = ends[first : first + _ROWS] - start
    width = int(lengths.max(initial=1))
    tokens = np.zeros((len(start), width), np.uint8)
    for position in range(width):
      inside = np.flatnonzero(lengths > position)
      tokens[inside, position] = data[start[inside] + position]
    yield tokens.view(f"S{width}")[:, 0]


def _number(tokens: list[bytes]) -> tuple[list[bytes], np.ndarray]:
  """Numbers tokens as they first appear -> (the distinct ones, the number of each row [rows] int64)."""
  distinct = list(dict.fromkeys(tokens))
  index = {token: number for number, token in enumerate(distinct)}
  return distinct, np.fromiter(map(index.__getitem__, tokens), np.int64, len(tokens))


def _timestamps(path: Path, blocks: Iterator[np.ndarray]) -> np.ndarray:
  read, line = [np.zeros(0)], 2
  for tokens in blocks:
    try:
      if np.any(tokens.view(np.uint8) == ord("_")):
        raise ValueError("not all are numbers")
      values = tokens.astype(np.float64)
    except ValueError:
      values = np.array([_number_or_nan(token) for token in tokens])
    if not np.isfinite(values).all():
      row = int(np.argmin(np.isfinite(values)))
      raise InputError(
        f"{path} line {line + row} field 'timestamp': expected a finite number, got {shown(tokens[row])}; correct it,"
        " or remove the column to keep the file's order"
      )
    read.append(values)
    line += len(tokens)
  return np.concatenate(read)


def _number_or_nan(token: bytes) -> float:
  """NaN for what is no number; Python would read "1_0" as ten."""
  try:
    return float("nan") if b"_" in token else float(token)
  except ValueError:
    return float("nan")


def _unread(path: Path | None, columns: list[str]) -> tuple[str, ...]:
  """A note on columns of `.item` that say something of the items and are not read; or none."""
  if path is None or not columns:
    return ()
  return (
    f"not used: {printable(', '.join(columns))} of {path.name}; bbqrec prepare {path.parent} --output=DIR and bbqrec"
    " features DIR make features of them",
  )


def _read_items(path: Path) -> tuple[list[bytes], tuple[str, ...], dict[str, np.ndarray], list[str]]:
  """Reads `.item`.

  Returns:
    The tokens, the titles, the features [N, D] float32 of each `float_seq` column by modality, and the columns with
    texts, categories or prices, which are not read.
  """
  lines = read_lines(path)
  columns = _read_header(path, lines[0] if lines else b"", ("item_id",))
  names = list(columns)
  rows = [line.split(b"\t") for line in lines[1:]]
  if not rows:
    raise InputError(f"{path}: expected at least one item, got only a header; write one line for each item")
  for number, row in enumerate(rows):
    if len(row) != len(names):
      raise _refuse_field_count(path, number + 2, len(names), len(row))
  place = names.index("item_id")
  tokens = [row[place] for row in rows]
  first: dict[bytes, int] = {}
  for number, token in enumerate(tokens):
    if not token:
      raise InputError(f"{path} line {number + 2} field 'item_id': expected a token, got an empty field; fill it in")
    check_label(token, where=f"{path} line {number + 2} field 'item_id'")
    if first.setdefault(token, number) != number:
      raise InputError(
        f"{path} line {number + 2} field 'item_id': expected each item on one line, got {shown(token)} again (first on"
        f" line {first[token] + 2}); remove one"
      )
  title = next((names.index(name) for name in TITLE_COLUMNS if name in columns), None)
  titles = ("",) * len(rows) if title is None else tuple(row[title].decode() for row in rows)
  tables: dict[str, np.ndarray] = {}
  for place, name in enumerate(names):
    if columns[name] == "float_seq":
      modality = modality_of(name)
      if modality in tables or not modality:
        raise InputError(f"{path} line 1: expected different modalities, got {shown(name)} for {modality!r}; rename it")
      tables[modality] = parse_vectors(path, name, [row[place] for row in rows], range(2, len(rows) + 2))
      if not tables[modality].any():
        raise InputError(
          f"{path} field '{name}': expected numbers for some items, got none or zeros; remove the column"
        )
  used = {"item_id", names[title] if title is not None else ""}
  unread = [name for name in names if columns[name] != "float_seq" and name not in used and name.lower() in _TELLING]
  return tokens, titles, tables, unread


def modality_of(column: str) -> str:
  """What the modality of a `float_seq` column is called: without a trailing `_features`, `_feature` or `_emb`."""
  return next((column[: -len(end)] for end in ("_features", "_feature", "_emb") if column.endswith(end)), column)


def parse_vectors(path: Path, name: str, cells: Sequence[bytes], lines: Sequence[int]) -> np.ndarray:
  """The vectors of a `float_seq` column, [N, D]; an empty cell is a row of zeros. float32, where that suits them.

  Args:
    path: of the table, for messages.
    name: of the column, likewise.
    cells: of the N items.
    lines: on which each stands.

  Raises:
    InputError: if one is not finite, or they are not all as many.
  """
  filled = [row for row, cell in enumerate(cells) if cell.split()]
  width = len(cells[filled[0]].split()) if filled else 0
  check_growth(path, sum(map(len, cells)), 8 * len(cells) * width)
  features = np.zeros((len(cells), width), np.float64)
  for row in filled:
    numbers = cells[row].split()
    place = f"{path} line {lines[row]} field '{name}'"
    if len(numbers) != width:
      raise InputError(f"{place}: expected {width} numbers as in the first row, got {len(numbers)}; correct the line")
    values = np.array([_number_or_nan(number) for number in numbers])
    fits = np.abs(values) <= LARGEST
    if not fits.all():
      worst = int(np.argmin(fits))
      mend = "scale the column" if np.isfinite(values[worst]) else "separate them by spaces"
      raise InputError(
        f"{place}: expected finite float32 numbers, got {shown(numbers[worst])}; {mend}, and leave the field empty for"
        " an item without"
      )
    features[row] = values
  there = np.any(features, axis=1)
  return features.astype(np.float32) if not there.any() or suits_float32(*spread(features, there)) else features
