"""Histories as rows of an epoch: packed several to a row, or one a row with what followed it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bbqrec_jax.data.interactions import Interactions
from bbqrec_jax.data.times import LONGEST_GAP

Batch = dict[str, Any]


def elapsed(interactions: Interactions, index: np.ndarray, users: np.ndarray) -> np.ndarray:
  """Whole seconds from a user's first interaction to others of that user, int32; 68 years at most.

  Args:
    interactions: with times.
    index: [...] int, places in the flat arrays.
    users: [...] int, whose they are.
  """
  assert interactions.times is not None
  with np.errstate(over="ignore"):
    seconds = interactions.times[index] - interactions.times[interactions.offsets[users]]
  return np.minimum(seconds, LONGEST_GAP).astype(np.int32)


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


class EpochRows(NamedTuple):
  """The rows of an epoch, which are made as they are asked for: they may take many times what the histories do.

  Attributes:
    num_rows: R.
    make: (first, last) -> these rows of every array; what is past R is empty.
  """

  num_rows: int
  make: Callable[[int, int], Batch]


def packed_epoch(
  interactions: Interactions, *, max_length: int, row_length: int, whole: bool, seed: int, epoch: int
) -> EpochRows:
  """All rows of one epoch, in random order.

  Args:
    interactions: the training histories.
    max_length: the most items of one window (`whole`) or the most inputs (otherwise).
    row_length: C, slots a row.
    whole: True keeps windows as they are, the target of a slot being the next one; False gives `items` and `targets`.
    seed: of the run.
    epoch: from 0.

  Returns:
    `items` (and `targets`), `segments`, `positions`, each [R, C] int32; segment 0 is padding. Where the interactions
    have times also `times`, see `elapsed`.
  """
  rng = np.random.default_rng([seed, epoch])
  users, spans = cut_windows(interactions.lengths, max_length - whole, rng)
  order = rng.permutation(len(users))
  users, spans = users[order], spans[order]
  sizes = spans[:, 1] - spans[:, 0] + whole
  rows, columns = pack(sizes, row_length)
  starts = interactions.offsets[users] + spans[:, 0]
  opens_row = np.append(True, rows[1:] != rows[:-1])[: len(rows)]
  number = np.arange(len(rows)) - np.maximum.accumulate(np.where(opens_row, np.arange(len(rows)), 0)) + 1

  def make(first: int, last: int) -> Batch:
    window = np.arange(*np.searchsorted(rows, (first, last)))
    window, place = np.repeat(window, sizes[window]), _places(sizes[window])
    slot = (rows[window] - first, columns[window] + place)
    source = starts[window] + place

    def fill(values):
      grid = np.zeros((last - first, row_length), np.int32)
      grid[slot] = values
      return grid

    batch = {
      "items": fill(interactions.items[source]),
      "segments": fill(number[window]),
      "positions": fill(place),
    }
    if interactions.times is not None:
      batch["times"] = fill(elapsed(interactions, source, users[window]))
    if not whole:
      batch["targets"] = fill(interactions.items[source + 1])
    return batch

  return EpochRows(int(rows[-1]) + 1 if len(rows) else 0, make)


def _places(sizes: np.ndarray) -> np.ndarray:
  """0, 1, ... within each of the groups that stand one after another: sizes [n] -> [sum of sizes]."""
  return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def length_groups(lengths: np.ndarray, bounds: tuple[int, ...], longest: int) -> list[tuple[int, np.ndarray]]:
  """Histories grouped by the least bound that holds them, so that little of a batch of one group is padding.

  Args:
    lengths: [R] int, none above `longest`.
    bounds: rising, each below `longest`; () makes one group of all.
    longest: the last bound.

  Returns:
    For each bound that some history has, rising: (bound, the histories' indices, rising).
  """
  every = np.array([*bounds, longest])
  group = np.searchsorted(every, lengths)
  return [
    (int(bound), np.flatnonzero(group == number)) for number, bound in enumerate(every) if np.any(group == number)
  ]


def prefix_epoch(
  interactions: Interactions,
  *,
  max_length: int,
  seed: int,
  epoch: int,
  batch_rows: int = 1,
  bounds: tuple[int, ...] = (),
) -> EpochRows:
  """Every transition of an epoch with the history before it, in random order: a sliding window over each history.

  Args:
    interactions: the training histories.
    max_length: T, the most items of a history; the last ones count.
    seed: of the run.
    epoch: from 0.
    batch_rows: rows of a batch.
    bounds: see `length_groups`; where there are some, each batch is of one group, filled up with empty rows at the end
      of the group, and the batches are in random order.

  Returns:
    `items`, `segments` (1, or 0 at padding), `positions` [R, T] int32, and `targets` [R] int32.
  """
  transitions = np.maximum(interactions.lengths - 1, 0)
  place = _places(transitions) + 1
  targets = np.repeat(interactions.offsets[:-1], transitions) + place
  rng = np.random.default_rng([seed, epoch])
  order = rng.permutation(len(targets))
  if bounds:
    batches = []
    for _, group in length_groups(np.minimum(place[order], max_length), bounds, max_length):
      batches.append(np.append(order[group], np.full(-len(group) % batch_rows, -1)).reshape(-1, batch_rows))
    order = rng.permutation(np.concatenate(batches)).reshape(-1)
  column = np.arange(max_length)

  def make(first: int, last: int) -> Batch:
    chosen = order[first:last]
    chosen = np.append(chosen, np.full(last - first - len(chosen), -1))
    there, target = chosen >= 0, targets[chosen]
    lengths = np.where(there, np.minimum(place[chosen], max_length), 0)
    real = column < lengths[:, None]
    source = np.where(real, (target - lengths)[:, None] + column, 0)
    return {
      "items": np.where(real, interactions.items[source], 0).astype(np.int32),
      "segments": real.astype(np.int32),
      "positions": np.where(real, column, 0).astype(np.int32),
      "targets": np.where(there, interactions.items[target], 0).astype(np.int32),
    }

  return EpochRows(len(order), make)
