"""Items by what they are called: titles that nearly match, and lists of ids as people write them."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bbqrec_jax.data.files import read_lines
from bbqrec_jax.data.item_ids import ItemIds, split_ids
from bbqrec_jax.errors import InputError, shown
from bbqrec_jax.utils.files import local_path

_ALIKE = 75  # Of 100, from where on a title counts as meant.


def find_titles(asked: str, titles: Sequence[str], *, count: int = 3) -> list[tuple[int, float]]:
  """The items whose titles are most like what was asked for.

  Args:
    asked: some words of a title, in any order and case, with a slip or two.
    titles: [N], "" where an item has none.
    count: how many to find.

  Returns:
    (row, likeness from 0 to 100) of each, the most alike first.
  """
  from rapidfuzz import fuzz, process, utils

  wanted = utils.default_process(asked)
  if not wanted:
    return []
  named = {row: utils.default_process(title) for row, title in enumerate(titles) if title}
  # That all words are there counts first, then how little else there is.
  near = process.extract(wanted, named, scorer=fuzz.token_set_ratio, limit=10 * count + 50)
  scored = [(row, likeness, fuzz.token_sort_ratio(wanted, title)) for title, likeness, row in near]
  scored.sort(key=lambda one: (-round(one[1]), -one[2], one[0]))
  return [(row, (2 * likeness + closeness) / 3) for row, likeness, closeness in scored[:count]]


def require_titles(text: str, titles: Sequence[str], *, flag: str) -> np.ndarray:
  """The rows [n] int32 of items by their titles.

  Args:
    text: titles separated by commas, in double quotes where they have some, as in CSV.
    titles: [N].
    flag: that gives the text, for messages.

  Raises:
    InputError: if one is like no title; names the most alike.
  """
  if not any(titles):
    raise InputError(f"{flag}: expected to know items by their titles, but the run's data has none; give their ids")
  rows = []
  for asked in _split(text, flag=flag):
    found = find_titles(asked, titles)
    if not found or found[0][1] < _ALIKE:
      near = ", ".join(shown(titles[row]) for row, _ in found)
      hint = f"the most alike are {near}" if near else "write a word or two of it"
      raise InputError(f"{flag}: expected the title of an item, got {shown(asked)}; {hint}")
    rows.append(found[0][0])
  return np.array(rows, np.int32)


def _split(text: str, *, flag: str) -> list[str]:
  try:
    return split_ids(text)
  except csv.Error as error:
    raise InputError(f"{flag}: expected entries separated by commas, got {shown(text)} ({error})") from None


def listed_items(text: str, item_ids: ItemIds, *, flag: str) -> np.ndarray:
  """The rows [n] int32 of a list of items.

  Args:
    text: ids separated by commas; or @FILE, with an id a line.
    item_ids: of the catalogue.
    flag: that gives the text, for messages.

  Raises:
    InputError: if one is not the id of an item (names the nearest), or there is none: a file of those to leave out
      alone may be empty, as when nothing is sold out.
  """
  if not text.startswith("@"):
    return item_ids.require(_split(text, flag=flag), where=lambda place: f"{flag} entry {place + 1}")
  path = Path(local_path(text[1:], flag=flag.lstrip("-")))
  ids = [line.decode().strip() for line in read_lines(path)]
  numbers = [number for number, one in enumerate(ids) if one]
  if not numbers and flag != "--deny":
    raise InputError(f"{path}: expected the id of an item a line, got an empty file")
  return item_ids.require([ids[number] for number in numbers], where=lambda place: f"{path} line {numbers[place] + 1}")
