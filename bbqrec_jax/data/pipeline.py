"""Batches: packed training histories on grain, catalogue samples beside them, and padded histories for evaluation.

Most histories are far shorter than the longest, so several are packed into a row (a padded batch would be two thirds
padding). The order is a pure function of the seed and the epoch, the iterator's state is three integers, and each
process takes its rows of every global batch: the same batches come out after a resume and on any number of processes.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import numpy as np

from bbqrec_jax.data.features import release, standardization
from bbqrec_jax.data.interactions import Interactions
from bbqrec_jax.errors import InputError

Batch = dict[str, Any]


def cut_windows(lengths: np.ndarray, max_transitions: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  """Cuts histories into windows so that every transition (item -> next item) falls into exactly one.

  A history of at most `max_transitions` is one window. A longer one is cut at a random phase, drawn anew each epoch, so
  that no transition always stands at the start of a window, where it would have little history.

  Args:
    lengths: [U] items of each history.
    max_transitions: the most transitions of one window.
    rng: the epoch's generator.

  Returns:
    (users, spans): [W] the history of each window; [W, 2] its first transition and the one past its last, counted from
    the history's start. Transition t leads from item t to item t + 1.
  """
  transitions = np.maximum(lengths - 1, 0)
  phase = np.where(transitions > max_transitions, rng.integers(0, max_transitions, len(lengths)), 0)
  opening = phase > 0
  windows = -(-(transitions - phase) // max_transitions) + opening
  users = np.repeat(np.arange(len(lengths)), windows)
  index = np.arange(len(users)) - np.repeat(np.cumsum(windows) - windows, windows)
  # With an opening window of `phase` transitions, window i > 0 starts at phase + (i - 1) * max_transitions.
  start = phase[users] + (index - opening[users]) * max_transitions
  stop = np.minimum(start + max_transitions, transitions[users])
  return users, np.stack([np.maximum(start, 0), stop], axis=1)


def pack(sizes: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
  """Puts windows into rows in their order, opening a new row when the next does not fit (next fit).

  Args:
    sizes: [W] slots each window takes, at most `row_length`.
    row_length: C.

  Returns:
    (rows, columns): [W] the row of each window and its first slot there.
  """
  ends = np.cumsum(sizes)
  rows = np.zeros(len(sizes), np.int64)
  columns = np.zeros(len(sizes), np.int64)
  first, row = 0, 0
  while first < len(sizes):
    used = ends[first] - sizes[first]
    last = int(np.searchsorted(ends, used + row_length, side="right"))
    rows[first:last] = row
    columns[first:last] = ends[first:last] - sizes[first:last] - used
    first, row = last, row + 1
  return rows, columns


def packed_epoch(
  interactions: Interactions, *, max_length: int, row_length: int, whole: bool, seed: int, epoch: int
) -> Batch:
  """All rows of one epoch, in random order.

  Args:
    interactions: the training histories.
    max_length: the most items of one window (`whole`) or the most inputs (otherwise).
    row_length: C, slots a row.
    whole: True keeps windows as they are, the target of a slot being the next one; False gives `items` and `targets`.
    seed: of the run.
    epoch: from 0.

  Returns:
    `items` (and `targets`), `segments`, `positions`, each [R, C] int32; segment 0 is padding.
  """
  rng = np.random.default_rng([seed, epoch])
  users, spans = cut_windows(interactions.lengths, max_length - whole, rng)
  order = rng.permutation(len(users))
  users, spans = users[order], spans[order]
  sizes = spans[:, 1] - spans[:, 0] + whole
  rows, columns = pack(sizes, row_length)
  num_rows = int(rows[-1]) + 1 if len(rows) else 0

  window = np.repeat(np.arange(len(users)), sizes)
  place = np.arange(len(window)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
  slot = (rows[window], columns[window] + place)
  source = (interactions.offsets[users] + spans[:, 0])[window] + place
  opens_row = np.append(True, rows[1:] != rows[:-1])[: len(rows)]
  number = np.arange(len(rows)) - np.maximum.accumulate(np.where(opens_row, np.arange(len(rows)), 0)) + 1

  def fill(values):
    grid = np.zeros((num_rows, row_length), np.int32)
    grid[slot] = values
    return grid

  epoch_rows = {
    "items": fill(interactions.items[source]),
    "segments": fill(number[window]),
    "positions": fill(place),
  }
  if not whole:
    epoch_rows["targets"] = fill(interactions.items[source + 1])
  return epoch_rows


def prefix_epoch(interactions: Interactions, *, max_length: int, seed: int, epoch: int) -> Batch:
  """Every transition of an epoch with the history before it, in random order: a sliding window over each history.

  Args:
    interactions: the training histories.
    max_length: T, the most items of a history; the last ones count.
    seed: of the run.
    epoch: from 0.

  Returns:
    `items`, `segments` (1, or 0 at padding), `positions` [R, T] int32, and `targets` [R] int32.
  """
  transitions = np.maximum(interactions.lengths - 1, 0)
  users = np.repeat(np.arange(len(transitions)), transitions)
  place = np.arange(len(users)) - np.repeat(np.cumsum(transitions) - transitions, transitions) + 1
  order = np.random.default_rng([seed, epoch]).permutation(len(users))
  target = (interactions.offsets[users] + place)[order]
  lengths = np.minimum(place[order], max_length)
  column = np.arange(max_length)
  real = column < lengths[:, None]
  source = np.where(real, (target - lengths)[:, None] + column, 0)
  return {
    "items": np.where(real, interactions.items[source], 0).astype(np.int32),
    "segments": real.astype(np.int32),
    "positions": np.where(real, column, 0).astype(np.int32),
    "targets": interactions.items[target].astype(np.int32),
  }


class EpochBatches(grain.IterDataset):
  """An endless stream of global batches of an epoch's rows, then the next epoch's; each process sees its own rows.

  Every element has what `epoch` gives, for the rows of this process, and `index`, the batch's number from 0. The last
  batch of an epoch is filled up with empty rows, so that every transition is seen once an epoch.
  """

  def __init__(
    self,
    interactions: Interactions,
    epoch: Callable[..., Batch],
    *,
    batch_rows: int,
    process_index: int = 0,
    process_count: int = 1,
  ):
    """Checks the shapes.

    Args:
      interactions: the training histories.
      epoch: (epoch=number) -> arrays whose first axis is the rows.
      batch_rows: rows of the global batch.
      process_index: which process this is.
      process_count: how many there are; must divide `batch_rows`.

    Raises:
      InputError: if processes do not divide the batch, or no history has two items.
    """
    super().__init__()
    if batch_rows % process_count:
      raise InputError(f"batch_rows {batch_rows} is not a multiple of the {process_count} processes")
    if not np.any(interactions.lengths > 1):
      raise InputError("no training history has two items: there is no next item to learn from")
    self.batch_rows, self.epoch = batch_rows, epoch
    share = batch_rows // process_count
    self.rows = slice(process_index * share, (process_index + 1) * share)

  def __iter__(self) -> grain.DatasetIterator:
    return _EpochIterator(self)


class PackedHistories(EpochBatches):
  """Batches of packed histories, see `packed_epoch`."""

  def __init__(
    self,
    interactions: Interactions,
    *,
    batch_rows: int,
    max_length: int,
    row_length: int,
    whole: bool,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
  ):
    """As `EpochBatches`; `row_length` is at least `max_length`.

    Raises:
      InputError: likewise, or if rows are shorter than histories.
    """
    if row_length < max_length:
      raise InputError(f"row_length {row_length} is less than max_length {max_length}: a full history must fit a row")
    epoch = functools.partial(
      packed_epoch, interactions, max_length=max_length, row_length=row_length, whole=whole, seed=seed
    )
    super().__init__(
      interactions, epoch, batch_rows=batch_rows, process_index=process_index, process_count=process_count
    )


class PrefixHistories(EpochBatches):
  """Batches of histories and what followed them, see `prefix_epoch`."""

  def __init__(
    self,
    interactions: Interactions,
    *,
    batch_rows: int,
    max_length: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
  ):
    """As `EpochBatches`."""
    epoch = functools.partial(prefix_epoch, interactions, max_length=max_length, seed=seed)
    super().__init__(
      interactions, epoch, batch_rows=batch_rows, process_index=process_index, process_count=process_count
    )


class _EpochIterator(grain.DatasetIterator):
  """Walks the rows of an epoch, then the next epoch's."""

  def __init__(self, dataset: EpochBatches):
    super().__init__()
    self._dataset = dataset
    self._state = {"epoch": 0, "row": 0, "index": 0}
    self._epoch: int | None = None
    self._rows: Batch = {}

  def __next__(self) -> Batch:
    dataset, state = self._dataset, self._state
    if self._epoch != state["epoch"]:
      self._rows = dataset.epoch(epoch=state["epoch"])
      self._epoch = state["epoch"]
    total = len(self._rows["items"])
    rows = np.arange(state["row"], state["row"] + dataset.batch_rows)[dataset.rows]
    batch: Batch = {name: grid[np.minimum(rows, total - 1)] for name, grid in self._rows.items()}
    for grid in batch.values():
      grid[rows >= total] = 0
    batch["index"] = state["index"]
    following = state["row"] + dataset.batch_rows
    done = following >= total
    self._state = {
      "epoch": state["epoch"] + done,
      "row": 0 if done else following,
      "index": state["index"] + 1,
    }
    return batch

  def get_state(self) -> dict[str, int]:
    return dict(self._state)

  def set_state(self, state: dict[str, int]) -> None:
    self._state = dict(state)


# Bytes of mapped features that may stay in memory before they are released.
_MAPPED = 2**28


class FeatureStore:
  """Standardised feature rows on demand; the arrays may be memory-mapped and never need to fit into memory."""

  def __init__(
    self,
    features: Mapping[str, np.ndarray],
    present: Mapping[str, np.ndarray],
    arrays: Mapping[str, np.ndarray] | None = None,
  ):
    """Computes each modality's mean and standard deviation over the items that have it.

    Args:
      features: [N, D] by modality, memory-mapped or not.
      present: [N] bool by modality.
      arrays: the statistics to use instead, as `arrays` gives them.
    """
    self.features, self.present = features, present
    self._read = 0  # Bytes since mapped pages were last released.
    if arrays is None:
      self.statistics = {name: standardization(features[name], present[name]) for name in features}
    else:
      self.statistics = {name: (arrays[f"mean/{name}"], arrays[f"deviation/{name}"]) for name in features}

  def arrays(self) -> dict[str, np.ndarray]:
    """The statistics by name, `mean/<modality>` and `deviation/<modality>`, each [D] float32."""
    return {
      f"{part}/{name}": value
      for name, pair in self.statistics.items()
      for part, value in zip(("mean", "deviation"), pair, strict=True)
    }

  def rows(self, items: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(features, present) of `items` [B]: modality -> [B, D] float32, zero where absent, and [B] bool."""
    features, present = {}, {}
    for name, array in self.features.items():
      mean, deviation = self.statistics[name]
      here = np.asarray(self.present[name][items], bool)
      values = (np.asarray(array[items], np.float32) - mean) / deviation
      features[name] = np.where(here[:, None], values, np.float32(0.0))
      present[name] = here
      self._read += len(here) * max(array.strides[0], 2**16)  # A page fault brings in up to 64 KiB around it.
    if self._read > _MAPPED:
      self._read = 0
      for array in self.features.values():
        release(array)
    return features, present


class CatalogueSample:
  """Item numbers of batch `index` of a walk through the catalogue that visits every item once a round."""

  def __init__(self, num_items: int, size: int, seed: int):
    """A walk over `num_items` in batches of `size`."""
    self.num_items, self.size, self.seed = num_items, size, seed

  def __call__(self, index: int) -> np.ndarray:
    """[size] int32."""
    place = np.arange(index * self.size, (index + 1) * self.size)
    rounds = place // self.num_items
    parts = []
    for number in np.unique(rounds):
      order = _round_order(self.num_items, self.seed, int(number))
      parts.append(order[place[rounds == number] % self.num_items])
    return np.concatenate(parts).astype(np.int32)


@functools.lru_cache(maxsize=4)
def _round_order(num_items: int, seed: int, number: int) -> np.ndarray:
  """The order of one walk through the catalogue; a batch needs at most a few, one after another."""
  return np.random.default_rng([seed, 1, number]).permutation(num_items)


def tokenizer_batches(
  histories: PackedHistories,
  store: FeatureStore,
  sample: CatalogueSample,
  *,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.IterDataset:
  """Joins packed whole histories with a catalogue sample and with the features of both.

  Returns:
    A dataset of the batches that `tokenizer_loss` takes, prefetched in a thread.
  """
  share = sample.size // process_count
  mine = slice(process_index * share, (process_index + 1) * share)

  def join(batch: Batch) -> Batch:
    items = sample(batch["index"])[mine]
    features, present = store.rows(items)
    slots = batch["items"]
    history_features, history_present = store.rows(slots.reshape(-1))
    grid = slots.shape

    def unflatten(rows):
      return {name: value.reshape(*grid, *value.shape[1:]) for name, value in rows.items()}

    return {
      "items": items,
      "features": features,
      "present": present,
      "history_items": slots,
      "history_features": unflatten(history_features),
      "history_present": unflatten(history_present),
      "segments": batch["segments"],
      "positions": batch["positions"],
    }

  return prefetched(histories.map(join))


def recommender_batches(histories: EpochBatches) -> grain.IterDataset:
  """Packed inputs and targets, prefetched in a thread."""
  return prefetched(histories.map(lambda batch: {name: grid for name, grid in batch.items() if name != "index"}))


def prefetched(dataset: grain.IterDataset, *, depth: int = 4) -> grain.IterDataset:
  """The same batches, prepared ahead in a thread; the checkpointable state stays that of the batch last taken."""
  return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=depth)


def evaluation_batches(
  histories: Interactions, targets: np.ndarray, *, batch_size: int, max_length: int
) -> Iterator[Batch]:
  """Histories one a row, their last `max_length` items, from the left; the last batch is filled with invalid rows.

  Args:
    histories: the inputs, in user order.
    targets: [U] int, the next item of each.
    batch_size: B.
    max_length: T.

  Yields:
    `items`, `segments`, `positions` [B, T] int32, `targets` [B] int32 and `valid` [B] bool.
  """
  lengths = np.minimum(histories.lengths, max_length)
  starts = histories.offsets[1:] - lengths
  column = np.arange(max_length)
  for first in range(0, histories.num_users, batch_size):
    rows = np.arange(first, first + batch_size)
    valid = rows < histories.num_users
    rows = np.minimum(rows, histories.num_users - 1)
    real = (column < lengths[rows, None]) & valid[:, None]
    index = np.minimum(starts[rows, None] + column, len(histories.items) - 1)
    yield {
      "items": np.where(real, histories.items[index], 0).astype(np.int32),
      "segments": real.astype(np.int32),
      "positions": np.where(real, column, 0).astype(np.int32),
      "targets": targets[rows].astype(np.int32),
      "valid": valid,
    }
