"""Standardised features on demand, and what is said of those that no item of the statistics can have had."""

import functools
import math
from collections.abc import Mapping

import numpy as np

from bbqrec_jax.data.features import release, standardization

# Bytes of mapped features that may stay in memory before they are released.
_MAPPED = 2**28

# Standard deviations from the mean, where features are cut off: no item that the statistics are of can be so far, and
# what the models make of another stays finite.
FURTHEST = 1e6

# Rows that quantiles are taken of.
_SAMPLED = 1024


class FeatureStore:
  """Standardised feature rows on demand; the arrays may be memory-mapped and never need to fit into memory."""

  def __init__(
    self,
    features: Mapping[str, np.ndarray],
    present: Mapping[str, np.ndarray],
    arrays: Mapping[str, np.ndarray] | None = None,
  ):
    """Reads nothing yet.

    Args:
      features: [N, D] by modality, memory-mapped or not.
      present: [N] bool by modality.
      arrays: the statistics to use instead of these items' own, as `arrays` gives them.
    """
    self.features, self.present = features, present
    self._given = arrays
    self._read = 0  # Bytes since mapped pages were last released.

  @functools.cached_property
  def statistics(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and standard deviation of each modality's columns, over the items that have it: two passes, once."""
    if self._given is not None:
      return {name: (self._given[f"mean/{name}"], self._given[f"deviation/{name}"]) for name in self.features}
    return {name: standardization(self.features[name], self.present[name]) for name in self.features}

  @property
  def num_items(self) -> int:
    """How many items it holds."""
    return len(next(iter(self.present.values())))

  def of(self, name: str) -> "FeatureStore":
    """The same of one modality alone."""
    return FeatureStore({name: self.features[name]}, {name: self.present[name]}, self.arrays())

  def arrays(self) -> dict[str, np.ndarray]:
    """The statistics by name, `mean/<modality>` and `deviation/<modality>`, each [D] as `standardization` gives it."""
    return {
      f"{part}/{name}": value
      for name, pair in self.statistics.items()
      for part, value in zip(("mean", "deviation"), pair, strict=True)
    }

  @property
  def nbytes(self) -> int:
    """What `table` would take."""
    return sum(4 * array.shape[0] * array.shape[1] + array.shape[0] for array in self.features.values())

  def table(self, *, block: int = 2048) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What `rows` gives of all items in order: modality -> [N, D] float32, and [N] bool; made a block at a time."""
    features = {name: np.empty(array.shape, np.float32) for name, array in self.features.items()}
    present = {name: np.empty(len(array), bool) for name, array in self.features.items()}
    for first in range(0, self.num_items, block):
      mine = slice(first, first + block)
      values, here = self.rows(np.arange(first, min(first + block, self.num_items)))
      for name in features:
        features[name][mine], present[name][mine] = values[name], here[name]
    return features, present

  def rows(self, items: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(features, present) of `items` [B]: modality -> [B, D] float32, zero where absent, and [B] bool."""
    features, present = {}, {}
    for name, array in self.features.items():
      mean, deviation = self.statistics[name]
      here = np.asarray(self.present[name][items], bool)
      values = np.zeros((len(items), array.shape[1]), np.float32)
      # Alone: the rows of the others may hold anything.
      with np.errstate(over="ignore"):
        standardised = (np.asarray(array[items[here]], mean.dtype) - mean) / deviation
      values[here] = np.clip(standardised, -FURTHEST, FURTHEST)
      features[name], present[name] = values, here
      self._read += len(here) * max(array.strides[0], 2**16)  # A page fault brings in up to 64 KiB around it.
    if self._read > _MAPPED:
      self._read = 0
      for array in self.features.values():
        release(array)
    return features, present


def far_features(store: FeatureStore, *, num_known: int, block: int = 2048) -> list[str]:
  """Says in words which new items have features that none of the known ones can have had.

  Of N numbers none is further than sqrt(N - 1) standard deviations from their mean, whatever they are. Features beyond
  that were made in another way, or their column hardly varied among the known items; what the models then say of the
  item means nothing.

  Args:
    store: of the new items, with the statistics of the known ones.
    num_known: how many of these there are, N.
    block: items that are looked at at once.

  Returns:
    A sentence for each modality that has such items.
  """
  bound, count = math.sqrt(num_known - 1), store.num_items
  far = dict.fromkeys(store.features, 0)
  worst = dict.fromkeys(store.features, (0.0, 0, 0))
  for first in range(0, count, block):
    rows, _ = store.rows(np.arange(first, min(first + block, count)))
    for name, values in rows.items():
      values = np.abs(values)
      far[name] += int(np.count_nonzero(values.max(axis=1) > 1.01 * bound))  # What rounding may add is no mistake.
      row, column = np.unravel_index(values.argmax(), values.shape)
      worst[name] = max(worst[name], (float(values[row, column]), first + int(row), int(column)))
  return [
    f"{name} features of {far[name]} of {count} new items are like no known item's: row {row} column {column} is"
    f" {deviations:.0f}{' or more' if deviations == FURTHEST else ''} standard deviations from the mean, where none of"
    f" {num_known} can be further than {bound:.0f}; make them as those of the known items were made"
    for name, (deviations, row, column) in worst.items()
    if far[name]
  ]


def squeezed_columns(store: FeatureStore) -> list[str]:
  """Says in words which columns a few outliers have stretched so far that nearly all items become one value in them.

  Args:
    store: of items, with their own statistics.

  Returns:
    A sentence for each modality with columns of which eight items of ten differ, but by less than a thousandth of the
    standard deviation; by 1,024 items, where there are more.
  """
  said = []
  for name, array in store.features.items():
    items = np.flatnonzero(store.present[name])
    items = items[np.linspace(0, len(items) - 1, min(len(items), _SAMPLED)).astype(np.int64)]
    rows = np.asarray(array[items], np.float64)
    release(array)
    # Of few items, an interpolated quantile would be partly an outlier's.
    low, high = np.quantile(rows, 0.1, axis=0, method="higher"), np.quantile(rows, 0.9, axis=0, method="lower")
    squeezed = np.flatnonzero((low < high) & (high - low < 1e-3 * store.statistics[name][1]))
    if len(squeezed):
      column = int(squeezed[0])
      more = f" and {len(squeezed) - 1} more" if len(squeezed) > 1 else ""
      said.append(
        f"{name} features: column {column}{more} holds outliers beside which nearly all items are one value (most are"
        f" {low[column]:.6g} to {high[column]:.6g}, the standard deviation is {store.statistics[name][1][column]:.6g});"
        " correct them, or give the column's logarithm"
      )
  return said
