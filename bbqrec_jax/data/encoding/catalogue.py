"""What `items.jsonl.gz` says of the items, read one after another."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bbqrec_jax.data.preparation.records import flat_text, read_lines
from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.files import is_given


def items_file(folder: Path) -> Path:
  """The file of a data set that describes its items.

  Raises:
    InputError: if there is none.
  """
  found = [folder / name for name in ("items.jsonl.gz", "items.jsonl") if is_given(folder / name)]
  if not found:
    raise InputError(
      f"{folder}: expected items.jsonl.gz, which says what the items are, found none; bbqrec prepare LOG --items=TABLE"
      " makes it"
    )
  return found[0]


def read_items(path: Path) -> Iterator[dict[str, Any]]:
  """The objects of the file, in order; `directory.load_directory` has checked them."""
  for row, line in enumerate(read_lines(path), start=1):
    if line.strip():
      try:
        record = json.loads(line)
      except (ValueError, RecursionError):
        record = None
      if not isinstance(record, dict):
        raise InputError(f"{path} line {row}: expected a JSON object, got something else; write one object a line")
      yield record


def category_levels(record: dict[str, Any]) -> list[str]:
  """The levels of an item's `category`, which are separated by `>`, or are a list.

  Without it those of `categories`, as others write them: separated by commas, unless one of these signs is there.
  """
  text = flat_text(record.get("category"), joiner=" > ")
  if not text:
    text = flat_text(record.get("categories"), joiner=" > ")
    text = text if ">" in text else text.replace(",", ">")
  return [level.strip() for level in text.split(">") if level.strip()]


def text_of(record: dict[str, Any]) -> str:
  """All that is written of an item: title, brand, category and description, as far as each is there."""
  title, brand, description = (flat_text(record.get(field)) for field in ("title", "brand", "description"))
  return " . ".join(filter(None, (title, brand, " > ".join(category_levels(record)), description)))


def attributes_of(record: dict[str, Any]) -> tuple[list[str], float | None]:
  """An item's brand and categories as tokens, each level of a category by itself; and its price."""
  tokens = []
  brand = flat_text(record.get("brand")).lower()
  if brand:
    tokens.append(f"brand={brand}")
  path = ""
  for level in map(str.lower, category_levels(record)):
    path = f"{path}>{level}"
    tokens += [f"category={level}", f"path={path}"]
  price = record.get("price")
  usable = isinstance(price, int | float) and not isinstance(price, bool) and 0 <= price < 1e12
  return list(dict.fromkeys(tokens)), float(price) if usable and price is not None else None
