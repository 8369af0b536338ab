"""Items by words of their titles."""

import numpy as np


class Titles:
  """Finds titles that hold given words, in any case and order.

  All titles stand in one text, which is searched for the longest of the words at the speed of `str.find`; the others
  are looked for in the titles that have it.
  """

  def __init__(self, titles: tuple[str, ...]):
    """Takes the titles of N items, "" where one has none."""
    self._folded = [" ".join(title.casefold().split()) for title in titles]
    self._text = "\n".join(self._folded)
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
    longest, first = max(parts, key=len), " ".join(parts)
    best: list[int] = []
    rest: list[int] = []
    place = self._text.find(longest)
    while place >= 0 and len(best) < count:
      row = int(np.searchsorted(self._starts, place, side="right")) - 1
      title = self._folded[row]
      if all(part in title for part in parts):
        (best if title.startswith(first) else rest).append(row)
      place = self._text.find(longest, int(self._starts[row + 1]))
    return (best + rest)[:count]
