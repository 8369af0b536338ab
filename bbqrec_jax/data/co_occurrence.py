"""Which items stand near each other in training histories, as lists of neighbours in bounded memory."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse

from bbqrec_jax.data.interactions import Interactions

_SHRINK = 2.0  # Added to each item's total: what was seen once or twice is not yet taken for a habit.
_PAIRS = 2**24  # That are there at once.


class Pairs(NamedTuple):
  """Which pairs of a history's items count, and how much.

  Attributes:
    window: places that two items may be apart.
    forward: what a pair counts from its earlier item to the later one.
    backward: what it counts from the later item to the earlier one.
    by_distance: whether that is divided by the distance.
  """

  window: int
  forward: float = 1.0
  backward: float = 1.0
  by_distance: bool = False


NEAR = Pairs(5, backward=0.5, by_distance=True)
TOGETHER = Pairs(20)
NEXT = Pairs(1, backward=0.0)
PREVIOUS = Pairs(1, forward=0.0)


def co_occurrence(
  histories: Interactions, *, num_items: int, count: int, pairs: Pairs = NEAR
) -> tuple[np.ndarray, np.ndarray]:
  """The items that most often follow each item, or stand near it.

      c[i, j] = sum over the pairs of i and j of what they count
      strength[i, j] = c[i, j] / sqrt((sum of c[i] + 2) (sum of c[:, j] + 2))

  Args:
    histories: the training histories, no held-out item among them.
    num_items: N.
    count: K, neighbours that are kept of each item, the strongest.
    pairs: which count.

  Returns:
    neighbours [N, K] int32, the strongest first, -1 where there are fewer, and strengths [N, K] float32, 0 there.
  """
  owner = np.repeat(np.arange(histories.num_users), histories.lengths)
  totals = np.zeros((2, num_items))
  for one, other, weight in _pairs(histories, owner, pairs):
    for side, items in enumerate((one, other)):
      totals[side] += np.bincount(items, minlength=num_items) * weight
  scale = 1.0 / np.sqrt(totals + _SHRINK)
  neighbours = np.full((num_items, count), -1, np.int32)
  strengths = np.zeros((num_items, count), np.float32)
  for start, stop in _blocks(histories, num_items, pairs.window):
    rows, columns, values = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    for one, other, weight in _pairs(histories, owner, pairs):
      inside = (one >= start) & (one < stop) & (one != other)
      rows.append(one[inside] - start)
      columns.append(other[inside])
      values.append(np.full(len(rows[-1]), weight, np.float32))
    table = scipy.sparse.coo_matrix(
      (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=(stop - start, num_items)
    ).tocsr()
    table.data *= np.repeat(scale[0, start:stop], np.diff(table.indptr)) * scale[1, table.indices]
    keep_strongest(table, neighbours[start:stop], strengths[start:stop])
  return neighbours, strengths


def keep_strongest(table: scipy.sparse.csr_matrix, neighbours: np.ndarray, strengths: np.ndarray) -> None:
  """Writes the largest numbers of each row [n, N] and their columns into arrays [n, K], ties by the lower column."""
  for row, (start, stop) in enumerate(itertools.pairwise(table.indptr)):
    items, strength = table.indices[start:stop], table.data[start:stop]
    order = np.lexsort((items, -strength))[: neighbours.shape[1]]
    neighbours[row, : len(order)] = items[order]
    strengths[row, : len(order)] = strength[order]


def _pairs(histories: Interactions, owner: np.ndarray, pairs: Pairs) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
  """(items, what stands near each, weight) of each distance and direction; `owner` [total] says whose a place is."""
  for distance in range(1, pairs.window + 1):
    together = owner[:-distance] == owner[distance:]
    first, second = histories.items[:-distance][together], histories.items[distance:][together]
    share = 1.0 / distance if pairs.by_distance else 1.0
    for one, other, weight in ((first, second, pairs.forward), (second, first, pairs.backward)):
      if weight:
        yield one, other, weight * share


def _blocks(histories: Interactions, num_items: int, window: int) -> Iterator[tuple[int, int]]:
  """Ranges of items that have about so many pairs together as may be there at once."""
  pairs = np.cumsum(2 * window * np.bincount(histories.items, minlength=num_items))
  start = 0
  while start < num_items:
    before = pairs[start - 1] if start else 0
    stop = max(start + 1, int(np.searchsorted(pairs, before + _PAIRS, side="right")))
    yield start, stop
    start = stop


def strength_buckets(strengths: np.ndarray, num_buckets: int) -> np.ndarray:
  """Buckets 0..num_buckets - 1 of even counts of the strengths above 0, the weakest first; 0 where there is none.

  Returns:
    [N, K] int32, for strengths [N, K].
  """
  known = strengths[strengths > 0]
  if not known.size:
    return np.zeros(strengths.shape, np.int32)
  edges = np.quantile(known, np.arange(1, num_buckets) / num_buckets)
  return np.searchsorted(edges, strengths, side="right").astype(np.int32)
