"""Item tables and folders of pictures: read a batch at a time, joined by the item's id, written as `items.jsonl.gz`."""

import contextlib
import gzip
import html
import io
import json
import os
import re
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bbqrec_jax.data.features import check_name
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.data.preparation.columns import ITEMS, choose
from bbqrec_jax.data.preparation.language import language_of
from bbqrec_jax.data.preparation.logs import wrong_ids
from bbqrec_jax.data.preparation.quarantine import Quarantine
from bbqrec_jax.data.preparation.settings import PreparationSettings
from bbqrec_jax.data.preparation.table import UNREADABLE, Batch, Table, as_text
from bbqrec_jax.data.recbole import modality_of, parse_vectors
from bbqrec_jax.errors import InputError, shown

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FIELDS = ("title", "description", "brand", "category", "price", "image")

KNOWN = "an item id that came before"  # Why a row cannot be used.

_LONGEST_TEXT = 20_000  # Characters of a description that are kept; no encoder reads as far.
_EACH_LANGUAGE = 20_000  # Titles that languages are told of, at most.


class Pictures:
  """The pictures of a folder, by their names, wherever in it they lie."""

  def __init__(self, folder: Path):
    """Lists the folder.

    Raises:
      InputError: if it is none, or has no pictures.
    """
    if not folder.is_dir():
      came = "a file" if folder.exists() else "nothing"
      raise InputError(f"--images={folder}: expected a folder of pictures, found {came}; check the path")
    self.folder = folder
    self._names: dict[str, str] = {}
    self._stems: dict[str, str] = {}
    for parent, folders, files in os.walk(folder):
      folders.sort()
      for file in sorted(files):
        stem, ending = os.path.splitext(file)
        if ending.lower() in PICTURES:
          path = os.path.relpath(os.path.join(parent, file), folder)
          self._names.setdefault(path, path)
          self._names.setdefault(file, path)
          self._stems.setdefault(stem, path)
    if not self._names:
      raise InputError(f"--images={folder}: expected pictures ({', '.join(PICTURES)}), found none; check the path")

  def __len__(self) -> int:
    return len(set(self._names.values()))

  def of(self, item: str, given: str) -> str:
    """The picture of an item, a path within the folder; "" where there is none.

    Args:
      item: its id.
      given: the file's path or name, or the URL that it came from; "" where the table says nothing.
    """
    if given:
      path = urllib.parse.unquote(urllib.parse.urlsplit(given).path) if "://" in given else given
      for name in (path, os.path.normpath(path), os.path.basename(path)):
        if name in self._names:
          return self._names[name]
    return self._stems.get(item, self._names.get(item, ""))


def has_required(record: dict[str, Any], pictures: Pictures | None, require: Sequence[str]) -> bool:
  """Whether an item that the table has has what is required of it, too.

  Args:
    record: of the item.
    pictures: that there are; None where no folder of them was given, and a name or URL in the table is enough.
    require: some of `settings.REQUIRED`.
  """
  given = record.get("image", "")
  return "picture" not in require or bool(given if pictures is None else pictures.of(record["id"], given))


class ItemFigures:
  """What is said of the items on the data card, gathered one by one."""

  def __init__(self) -> None:
    """Has seen no item yet."""
    self.count = 0
    self.unused = 0  # Items that are left out, as nobody has interacted with them.
    self.pictures: set[str] = set()
    self.have: Counter[str] = Counter()
    self.unread: Counter[str] = Counter()  # What the table says and is not in the data set, by what it is.
    self.unread_example: dict[str, str] = {}
    self.lengths: dict[str, list[int]] = {"title": [], "description": []}  # Words.
    self.prices: list[float] = []
    self.languages: Counter[str] = Counter()
    self.brands: Counter[str] = Counter()
    self.categories: Counter[str] = Counter()
    self.brand_numbers: list[int] = []  # 0 for none.
    self._brands: dict[str, int] = {"": 0}

  def leave_out(self, item: str, what: str, text: str) -> None:
    """Counts what is not taken over of an item.

    Args:
      item: its id.
      what: it is, in the plural; the same words for all of one kind.
      text: what the table says.
    """
    self.unread[what] += 1
    self.unread_example.setdefault(what, f"{shown(text)} of {shown(item)}")

  def add(self, record: dict[str, Any]) -> None:
    """Counts an item in."""
    self.count += 1
    self.pictures.update([record["image"]] if "image" in record else [])
    for field in FIELDS:
      self.have[field] += field in record
    for field, lengths in self.lengths.items():
      if field in record:
        lengths.append(len(record[field].split()))
    if "price" in record:
      self.prices.append(record["price"])
    self.brands.update([record["brand"]] if "brand" in record else [])
    self.categories.update([record["category"].split(" > ")[-1]] if "category" in record else [])
    title = record.get("title", "")
    if title and self.languages.total() < _EACH_LANGUAGE:
      self.languages[language_of(f"{title} {record.get('description', '')[:300]}")] += 1
    brand = record.get("brand", "").lower()
    self.brand_numbers.append(self._brands.setdefault(brand, len(self._brands)))


def price_of(text: str) -> float | None:
  """The number in a price such as "$1,299.00", "12,99 EUR" or "2.500,-"; None if there is none, or it is negative."""
  if re.fullmatch(r"\s*\d+(\.\d*)?[eE][-+]?\d+\s*", text):  # As programs write 1200000.0.
    text = f"{float(text):f}"
  found = re.search(r"\d[\d.,' ]*", text)
  if not found or re.search(r"^\s*[-\u2212]|[-\u2212]$", text[: found.start()]):
    return None
  digits = re.sub(r"[' ]", "", found[0])
  comma = digits.endswith(",") and text[found.end() :].startswith(("-", "\u2013", "\u2014"))  # As in 2.500,-
  digits = digits.rstrip(".,")
  if comma or re.search(r",\d{1,2}$", digits):  # A decimal comma.
    digits = digits.replace(".", "").replace(",", ".")
  digits = digits.replace(",", "")
  if digits.count(".") > 1:
    digits = digits.replace(".", "")
  try:
    value = float(digits)
  except ValueError:
    return None
  return value if 0 <= value < 1e12 else None


def read_items(
  table: Table, settings: PreparationSettings, quarantine: Quarantine, chosen: dict[str, tuple[str, ...]]
) -> Iterator[dict[str, Any]]:
  """The items of a table, each once, as the objects that `items.jsonl` holds.

  A price that is none is text, and a text that is too long is whole: `write_items` leaves them out, and says so.

  Args:
    table: of the items.
    settings: how many rows may be unusable.
    quarantine: for rows without an id, or with one that came before.
    chosen: which columns are what, of `item_columns`.

  Raises:
    InputError: if the file cannot be read on, or too many of its rows cannot be used.
  """
  known: set[str] = set()
  for batch in table.batches(wanted_columns(chosen), quarantine):
    for row, record in read_item(table, batch, chosen, quarantine):
      if record["id"] in known:
        quarantine.add(table.name, row, KNOWN, record["id"])
        continue
      known.add(record["id"])
      yield record
  rows = len(known) + sum(quarantine.of(table.name).values())
  quarantine.check(table.name, rows=rows, most=settings.max_bad)


def wanted_columns(chosen: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
  """The columns of a table that are looked at."""
  return tuple(dict.fromkeys(name for names in chosen.values() for name in names))


def read_item(
  table: Table, batch: Batch, chosen: dict[str, tuple[str, ...]], quarantine: Quarantine
) -> Iterator[tuple[int, dict[str, Any]]]:
  """The row and the object of each item of a batch that has a usable id.

  Args:
    table: of the items.
    batch: some of its rows.
    chosen: which columns are what.
    quarantine: gets the other rows.
  """
  texts = {name: as_text(batch.columns[name]) for name in wanted_columns(chosen)}
  ids, bad = texts[chosen["item_id"][0]]
  usable = np.ones(len(batch.rows), bool)
  for faulty, reason in wrong_ids(ids, bad, "item id"):
    for place in np.flatnonzero(faulty & usable).tolist():
      quarantine.add(table.name, batch.rows[place], reason, ids[place].as_py())
    usable[faulty] = False
  columns = {kind: [texts[name][0].to_pylist() for name in names] for kind, names in chosen.items()}
  for place, name in enumerate(chosen.get("category", ())):
    if name in table.sequences:
      columns["category"][place] = list(map(_levels, columns["category"][place]))
  for place, item in enumerate(columns["item_id"][0]):
    if usable[place]:
      fields = {kind: [values[place] for values in parts] for kind, parts in columns.items()}
      yield int(batch.rows[place]), _item(item, fields)


def _levels(tokens: str) -> str:
  """A cell of several tokens as levels: between commas where there are any, else between blanks."""
  if ">" in tokens:
    return tokens
  parts = tokens.split(",") if "," in tokens else tokens.split()
  return " > ".join(filter(None, (part.strip(" '\"[]") for part in parts)))


def read_vectors(table: Table, item_column: str, item_ids: ItemIds) -> dict[str, np.ndarray]:
  """The vectors [N, D] of a table's `float_seq` columns, by modality, those that any of the items has.

  Args:
    table: of the items.
    item_column: which has their ids.
    item_ids: of the N items.

  Raises:
    InputError: if one is not finite, they are not all as many, or two columns are one modality.
  """
  found: dict[str, np.ndarray] = {}
  cells = {name: [b""] * len(item_ids) for name in table.vectors}
  lines = [0] * len(item_ids)
  for batch in table.batches((item_column, *table.vectors), Quarantine(Path(os.devnull))):
    texts = {name: as_text(batch.columns[name])[0].to_pylist() for name in (item_column, *table.vectors)}
    for place, row in enumerate(item_ids.rows(texts[item_column]).tolist()):
      if row >= 0 and not lines[row]:  # The first that there is of an item.
        lines[row] = int(batch.rows[place])
        for name in table.vectors:
          cells[name][row] = texts[name][place].encode()
  for name in table.vectors:
    modality = modality_of(name)
    check_name(modality, where=f"{table.name} line 1")
    if modality in found:
      raise InputError(
        f"{table.name} line 1: expected different modalities, got {shown(name)} for {modality}; rename it"
      )
    vectors = parse_vectors(table.path or Path(table.name), name, cells[name], lines)
    if vectors.any():
      found[modality] = vectors
  return found


def item_columns(table: Table, settings: PreparationSettings) -> dict[str, tuple[str, ...]]:
  """Which columns of an item table are what.

  Raises:
    InputError: if one that was named is not there, or the id's cannot be guessed.
  """
  asked = {kind: getattr(settings, kind) for kind in ITEMS}
  texts = tuple(name for name in table.columns if name not in table.vectors)
  return choose(texts, ITEMS, asked, ("item_id",), where=table.name)


def _item(item: str, fields: dict[str, list[str]]) -> dict[str, Any]:
  record: dict[str, Any] = {"id": item}
  for kind in FIELDS:
    values = list(filter(None, fields.get(kind, [])))
    if not values:
      continue
    if kind == "price":
      price = price_of(values[0])
      record[kind] = values[0] if price is None else price
    else:
      text = (" > " if kind == "category" else " ").join(dict.fromkeys(values))
      text = text.replace(UNREADABLE, "\N{REPLACEMENT CHARACTER}")
      if kind == "image":  # Of several the first, by its URL where it has one.
        parts = text.split(" > ")
        record[kind] = next((part for part in parts if "://" in part), parts[0])
      else:
        record[kind] = " ".join((html.unescape(text) if "&" in text else text).split())
  return {name: value for name, value in record.items() if value != ""}


@contextlib.contextmanager
def compressed_text(path: Path) -> Iterator[io.TextIOWrapper]:
  """A gzip file for text; the same text gives the same bytes."""
  with (
    path.open("wb") as raw,
    gzip.GzipFile("", "wb", compresslevel=3, fileobj=raw, mtime=0) as packed,
    io.TextIOWrapper(io.BufferedWriter(packed, 2**16), encoding="utf-8") as file,
  ):
    yield file


def write_items(
  path: Path,
  wanted: Sequence[str],
  *,
  records: Iterable[dict[str, Any]],
  table: str | None,
  pictures: Pictures | None,
  unseen: bool,
) -> tuple[np.ndarray, ItemFigures]:
  """Writes `items.jsonl.gz`: the wanted items, in the order of the table, then those that it lacks.

  Args:
    path: of the file.
    wanted: ids of items with interactions.
    records: what `read_items` gives of the table; nothing without one.
    table: its name, None without one.
    pictures: of the items, if there are any.
    unseen: whether items that nobody wants stay.

  Returns:
    The number that each wanted item got [n] int32; and figures about all items.

  Raises:
    InputError: as `read_items`, or if none of the wanted items is in the table.
  """
  places = {item: place for place, item in enumerate(wanted)}
  number = np.full(len(wanted), -1, np.int32)
  figures = ItemFigures()
  with compressed_text(path) as file:

    def write(record: dict[str, Any]) -> None:
      item = record["id"]
      if isinstance(record.get("price"), str):
        figures.leave_out(item, "prices that are no numbers", record["price"])
        record = {name: value for name, value in record.items() if name != "price"}
      for name, value in record.items():
        if isinstance(value, str) and len(value) > _LONGEST_TEXT:
          figures.leave_out(item, f"texts beyond {_LONGEST_TEXT:,} characters", value)
          record = record | {name: value[:_LONGEST_TEXT].rstrip()}
      if pictures is not None:
        named = record.get("image", "")
        picture = pictures.of(item, named)
        if named and not picture:
          figures.leave_out(item, "pictures that are not in the folder", named)
        record = {name: value for name, value in record.items() if name != "image"}
        record |= {"image": picture} if picture else {}
      figures.add(record)
      file.write(json.dumps(record, ensure_ascii=False) + "\n")

    for record in records:
      place = places.get(record["id"], -1)
      if place >= 0:
        number[place] = figures.count
      if place >= 0 or unseen:
        write(record)
      else:
        figures.unused += 1
    if table is not None and not np.any(number >= 0):
      example = next(iter(wanted), "")
      raise InputError(
        f"{table}: expected the items of the log, such as {example!r}, found none of them; say which column has their"
        " ids with --item_id=COLUMN"
      )
    for place in np.flatnonzero(number < 0).tolist():
      number[place] = figures.count
      write({"id": wanted[place]})
  return number, figures
