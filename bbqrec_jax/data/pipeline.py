"""Training batches: histories on grain, and catalogue samples beside them.

Most histories are far shorter than the longest, so several are packed into a row (a padded batch would be two thirds
padding). The order is a pure function of the seed and the epoch, the iterator's state is three integers, and each
process takes its rows of every global batch: the same batches come out after a resume and on any number of processes.
"""

import functools
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from bbqrec_jax.data.feature_store import FeatureStore
from bbqrec_jax.data.interactions import Interactions
from bbqrec_jax.data.packing import Batch, EpochRows, packed_epoch, prefix_epoch
from bbqrec_jax.errors import InputError


class EpochBatches(grain.IterDataset):
  """An endless stream of global batches of an epoch's rows, then the next epoch's; each process sees its own rows.

  Every element has what `epoch` gives, for the rows of this process, and `index`, the batch's number from 0. The last
  batch of an epoch is filled up with empty rows, so that every transition is seen once an epoch; and so is every batch
  to a multiple of the devices, so that any number of them trains on the same batches.
  """

  def __init__(
    self,
    interactions: Interactions,
    epoch: Callable[..., EpochRows],
    *,
    batch_rows: int,
    process_index: int = 0,
    process_count: int = 1,
    bounds: tuple[int, ...] = (),
    multiple: int = 1,
  ):
    """Checks the shapes.

    Args:
      interactions: the training histories.
      epoch: (epoch=number) -> the rows of that epoch.
      batch_rows: rows of the global batch.
      process_index: which process this is.
      process_count: how many there are; must divide the rows, filled up.
      bounds: lengths, rising: a batch is cut to the least that holds its longest row; of the global batch, so that
        every process has the same shape.
      multiple: empty rows fill a batch up to one of it.

    Raises:
      InputError: if processes do not divide the batch, or no history has two items.
    """
    super().__init__()
    filled = batch_rows + -batch_rows % multiple
    if filled % process_count:
      raise InputError(f"batch_rows {filled} is not a multiple of the {process_count} processes")
    if not np.any(interactions.lengths > 1):
      raise InputError("no training history has two items: there is no next item to learn from")
    self.batch_rows, self.epoch, self.bounds = batch_rows, epoch, bounds
    share = filled // process_count
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
    multiple: int = 1,
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
      interactions,
      epoch,
      batch_rows=batch_rows,
      process_index=process_index,
      process_count=process_count,
      multiple=multiple,
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
    bounds: tuple[int, ...] = (),
    multiple: int = 1,
  ):
    """As `EpochBatches`."""
    epoch = functools.partial(
      prefix_epoch, interactions, max_length=max_length, seed=seed, batch_rows=batch_rows, bounds=bounds
    )
    super().__init__(
      interactions,
      epoch,
      batch_rows=batch_rows,
      process_index=process_index,
      process_count=process_count,
      bounds=bounds,
      multiple=multiple,
    )


class _EpochIterator(grain.DatasetIterator):
  """Walks the rows of an epoch, then the next epoch's."""

  def __init__(self, dataset: EpochBatches):
    super().__init__()
    self._dataset = dataset
    self._state = {"epoch": 0, "row": 0, "index": 0}
    self._epoch: int | None = None
    self._rows: EpochRows

  def __next__(self) -> Batch:
    dataset, state = self._dataset, self._state
    if self._epoch != state["epoch"]:
      self._rows = dataset.epoch(epoch=state["epoch"])
      self._epoch = state["epoch"]
    first, following = state["row"], state["row"] + dataset.batch_rows
    if dataset.bounds:
      everyones = self._rows.make(first, following)
      longest = np.max(np.sum(everyones["segments"] > 0, axis=1))
      length = next((bound for bound in dataset.bounds if bound >= longest), None)
      batch = {
        name: grid[dataset.rows, :length] if grid.ndim == 2 else grid[dataset.rows] for name, grid in everyones.items()
      }
    else:
      start, stop = (min(first + place, following) for place in (dataset.rows.start, dataset.rows.stop))
      batch = self._rows.make(start, stop)
    share = dataset.rows.stop - dataset.rows.start
    batch = {name: _with_rows(grid, share) for name, grid in batch.items()}
    batch["index"] = state["index"]
    done = following >= self._rows.num_rows
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


def _with_rows(grid: np.ndarray, count: int) -> np.ndarray:
  """The rows of an array, and empty ones up to so many."""
  missing = count - len(grid)
  return np.pad(grid, ((0, missing), *((0, 0),) * (grid.ndim - 1))) if missing else grid


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
  store: FeatureStore | None,
  sample: CatalogueSample,
  *,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.IterDataset:
  """Joins packed whole histories with a catalogue sample and with the features of both.

  Args:
    histories: whole histories.
    store: of the features; None leaves them out, for steps that have those of all items.
    sample: of the catalogue.
    process_index: which process this is.
    process_count: of how many, each with its rows of the batch.

  Returns:
    A dataset of the batches that `tokenizer_loss` takes, prefetched in a thread.
  """
  share = sample.size // process_count
  mine = slice(process_index * share, (process_index + 1) * share)

  def join(batch: Batch) -> Batch:
    numbers = {
      "items": sample(batch["index"])[mine],
      "history_items": batch["items"],
      "segments": batch["segments"],
      "positions": batch["positions"],
    }
    return numbers if store is None else numbers | features_of(numbers, store.rows)

  return prefetched(histories.map(join))


def features_of(batch: Batch, rows: Callable[[Any], tuple[dict[str, Any], dict[str, Any]]]) -> Batch:
  """The features that a batch of item numbers lacks.

  Args:
    batch: of `tokenizer_batches`, of NumPy's arrays or traced ones.
    rows: items [B] -> (features, present) as `FeatureStore.rows` gives them.
  """
  grid = batch["history_items"].shape
  features, present = rows(batch["items"])
  history_features, history_present = (
    {name: value.reshape(*grid, *value.shape[1:]) for name, value in part.items()}
    for part in rows(batch["history_items"].reshape(-1))
  )
  return {
    "features": features,
    "present": present,
    "history_features": history_features,
    "history_present": history_present,
  }


def recommender_batches(histories: EpochBatches) -> grain.IterDataset:
  """Packed inputs and targets, prefetched in a thread."""
  return prefetched(histories.map(lambda batch: {name: grid for name, grid in batch.items() if name != "index"}))


def prefetched(dataset: grain.IterDataset, *, depth: int = 4) -> grain.IterDataset:
  """The same batches, prepared ahead in a thread; the checkpointable state stays that of the batch last taken."""
  return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=depth)
