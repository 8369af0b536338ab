"""Why an item is recommended: which items of the history speak for it, through what."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Reason(NamedTuple):
  """An item of a history that speaks for a recommended one.

  Attributes:
    item: its row.
    stream: what the two are compared by.
    similarity: the cosine of their vectors; None where they are compared by how often they stand near each other.
    bucket: of the similarity, the higher the more similar; "itself" where the two are one item, "missing" where one of
      them has no vector; None for a model that adds nothing for similarity.
    added: what the model adds to the recommended item's score for it, more than if the two were of the lowest bucket,
      or no neighbours; None for a model that adds nothing.
  """

  item: int
  stream: str
  similarity: float | None
  bucket: int | str | None = None
  added: float | None = None


def latest_distinct(history: np.ndarray) -> np.ndarray:
  """The distinct items of a history, the latest first."""
  return np.fromiter(dict.fromkeys(history[::-1].tolist()), np.int64)


def filled(rows: Sequence[np.ndarray], *, num_rows: int | None = None, width: int | None = None) -> np.ndarray:
  """Rows of different lengths as [num_rows, width] int32, as many and as wide as they are if None; -1 fills."""
  shape = len(rows) if num_rows is None else num_rows, max(map(len, rows)) if width is None else width
  grid = np.full(shape, -1, np.int32)
  for place, row in enumerate(rows):
    grid[place, : len(row)] = row
  return grid


def _strongest(worth: np.ndarray, *, count: int) -> tuple[np.ndarray, ...]:
  """The `count` places of each item's history that are worth most, each by the stream in which it is, the best first.

  Args:
    worth: [S, B, k, R] of each stream, user, item and place.
    count: at most R are given.

  Returns:
    What indexes `worth`, each [B, k, count] or to be broadcast to that.
  """
  most, through = worth.max(axis=0), worth.argmax(axis=0)
  places = np.argsort(-most, axis=-1, kind="stable")[..., :count]
  users, items = (index[..., None] for index in np.indices(most.shape[:2], sparse=True))
  return through[users, items, places], users, items, places


def _told(
  make: Callable[..., Reason], arrays: Sequence[np.ndarray], items: Sequence[np.ndarray]
) -> list[list[list[Reason]]]:
  """Of each user and item what `make` makes of the arrays [B, k, count], where the last one is above zero."""
  return [
    [[make(*one) for one in zip(*row, strict=True) if one[-1] > 0] for row in zip(*user, strict=True)][: len(own)]
    for own, *user in zip(items, *(array.tolist() for array in arrays), strict=True)
  ]


class Cosines:
  """Reasons by likeness alone: what a recommended item resembles by what the model is told of items.

  They are no proof of what the model computed. Items that are unlike it, of a cosine of zero or less, are no reasons.
  """

  def __init__(self, vectors: Mapping[str, np.ndarray], *, max_length: int):
    """Takes the unit vectors [N, d] of each stream, and how many items of a history a model looks at."""
    self._streams, self._max_length = tuple(vectors), max_length
    width = max(array.shape[1] for array in vectors.values())
    self._vectors = np.stack([
      np.pad(array.astype(np.float32), ((0, 0), (0, width - array.shape[1]))) for array in vectors.values()
    ])  # fmt: skip

  def __getitem__(self, stream: str) -> np.ndarray:
    """The vectors of a stream, [N, d]; zeros fill their end."""
    return self._vectors[self._streams.index(stream)]

  def __call__(
    self, histories: Sequence[np.ndarray], items: Sequence[np.ndarray], *, count: int
  ) -> list[list[list[Reason]]]:
    """For each item the `count` items of its history that are nearest, in the stream in which they are nearest."""
    recent, rows = filled([latest_distinct(own)[: self._max_length] for own in histories]), filled(items)
    cosines = self._vectors[:, rows] @ self._vectors[:, recent].swapaxes(-1, -2)
    cosines[:, np.broadcast_to(recent[:, None] < 0, cosines.shape[1:])] = -np.inf
    chosen = streams, users, _, places = _strongest(cosines, count=count)

    def reason(item: int, stream: int, cosine: float) -> Reason:
      return Reason(item, self._streams[stream], cosine)

    return _told(reason, (recent[users, places], streams, cosines[chosen]), items)


class Addends:
  """Reasons of a model with candidate similarity: the numbers of its tables, whose sum stands in the score.

  They are counted from the lowest bucket, that of items with nothing in common: a number that is added to a whole row
  of a table is added to all items, and changes no list. `ops.candidate_similarity` computes the sums, which a network
  of signals may weigh against others after that.
  """

  def __init__(self, streams: Sequence[str], arrays: Mapping[str, np.ndarray], *, max_length: int):
    """Takes what the model compares candidates by.

    Args:
      streams: names of the S streams of vectors.
      arrays: `vectors/0` and on [N, d], `edges` [S, n - 1], `tables` [S, R, n + 2]; for a model that looks at
        neighbours also `neighbours` and `buckets` [N, K], `neighbour_table` [R, n].
      max_length: how many items of a history the model looks at.
    """
    self._arrays, self._max_length = arrays, max_length
    self._streams = tuple(streams) if "neighbours" not in arrays else (*streams, "behaviour")
    self._vectors = [arrays[f"vectors/{index}"] for index in range(len(streams))]
    self._there = np.array([np.any(unit != 0, axis=1) for unit in self._vectors])
    self._tables, self._last_items = arrays["tables"] - arrays["tables"][..., :1], arrays["tables"].shape[1]
    self._buckets: list[int | str] = [*range(arrays["edges"].shape[1] + 1), "itself", "missing"]

  def _of_vectors(self, recent: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, ...]:
    """Cosines, buckets and addends of each stream of vectors, user, item and place, [S, B, k, R]."""
    cosines = np.stack([unit[items] @ unit[recent].swapaxes(-1, -2) for unit in self._vectors])
    edges = self._arrays["edges"]
    buckets = np.stack([np.searchsorted(own, of) for own, of in zip(edges, cosines, strict=True)])
    there = self._there[:, items][..., None] & self._there[:, recent][:, :, None]
    buckets = np.where(there, buckets, len(self._buckets) - 1)
    buckets = np.where(items[..., None] == recent[:, None], len(self._buckets) - 2, buckets)
    streams = np.arange(len(cosines))[:, None, None, None]
    return cosines, buckets, self._tables[streams, np.arange(recent.shape[1]), buckets]

  def _of_neighbours(self, recent: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, ...]:
    """The same by lists of neighbours, [1, B, k, R], without cosines; for an item that is in none nothing is added."""
    near = items[..., None, None] == self._arrays["neighbours"][recent][:, None]
    users, places = np.arange(len(recent))[:, None, None], np.arange(recent.shape[1])
    buckets = self._arrays["buckets"][recent][users, places, near.argmax(axis=-1)]
    added = np.where(near.any(axis=-1), self._arrays["neighbour_table"][places, buckets], 0.0)
    return np.zeros_like(added)[None], buckets[None], added[None]

  def __call__(
    self, histories: Sequence[np.ndarray], items: Sequence[np.ndarray], *, count: int
  ) -> list[list[list[Reason]]]:
    """For each item the `count` items of its history that most is added for, each by the stream that adds most.

    Those for which nothing or less than nothing is added are no reasons.
    """
    recent = filled([latest_distinct(own[-self._max_length :])[: self._last_items] for own in histories])
    rows = filled(items)
    every = [self._of_vectors(recent, rows)] if self._vectors else []
    if len(self._streams) > len(self._vectors):
      every.append(self._of_neighbours(recent, rows))
    cosines, buckets, added = map(np.concatenate, zip(*every, strict=True))
    added = np.where(recent[:, None] >= 0, added, 0.0)
    chosen = streams, users, _, places = _strongest(added, count=count)

    def reason(item: int, stream: int, cosine: float, bucket: int, added: float) -> Reason:
      name = self._streams[stream]
      return Reason(item, name, cosine if stream < len(self._vectors) else None, self._buckets[bucket], added)

    told = recent[users, places], streams, cosines[chosen], buckets[chosen], added[chosen]
    return _told(reason, told, items)
