"""Items by words of their titles."""

import itertools
from collections.abc import Iterator

import numpy as np

_MOST = 50_000  # Titles that are looked into for one query.


class Titles:
  """Finds titles that hold given words, in any case and order.

  All titles stand in one text, each after a line break, which is searched for the longest of the words at the speed of
  `str.find`; the others are looked for in the titles that have it, the first 50,000 at most.
  """

  def __init__(self, titles: tuple[str, ...]):
    """Takes the titles of N items, "" where one has none."""
    self._folded = [" ".join(title.casefold().split()) for title in titles]
    self._text = "".join(f"\n{title}" for title in self._folded)
    self._starts = np.append(0, np.cumsum([len(title) + 1 for title in self._folded], dtype=np.int64))
    self._rows: dict[str, int] = {}
    for row, title in enumerate(self._folded):
      self._rows[title] = -1 if title in self._rows else row

  def row(self, title: str) -> int | None:
    """The row of the item with a title; -1 where several have it, None where none has."""
    folded = " ".join(title.casefold().split())
    return self._rows.get(folded) if folded else None

  def search(self, words: str, *, count: int) -> list[int]:
    """Rows of the first `count` items whose titles hold all words, those that begin with them first."""
    parts = words.casefold().split()
    if not parts:
      return []
    first = " ".join(parts)
    best = list(itertools.islice(self._hits(f"\n{first}"), count))
    rest = (
      row
      for row in itertools.islice(self._hits(max(parts, key=len)), _MOST)
      if not self._folded[row].startswith(first) and all(part in self._folded[row] for part in parts)
    )
    return best + list(itertools.islice(rest, count - len(best)))

  def _hits(self, part: str) -> Iterator[int]:
    """Rows of the titles that hold a part, in their order."""
    place = self._text.find(part)
    while place >= 0:
      row = int(np.searchsorted(self._starts, place, side="right")) - 1
      yield row
      place = self._text.find(part, int(self._starts[row + 1]))
