"""How long a recommender trains, and in batches of which shapes it trains and ranks, by its config and the data."""

from typing import Any

import grain
import jax
import numpy as np

from bbqrec_jax.data.interactions import Interactions, Split, distinct_items
from bbqrec_jax.data.pipeline import PackedHistories, PrefixHistories, recommender_batches
from bbqrec_jax.data.ranking import ordinary_width
from bbqrec_jax.recommender.settings import is_packed, row_length

_FEWEST_STEPS = 100  # Batches are made so small that an epoch has as many; validations are at least as far apart.
_FEWEST_POSITIONS, _MOST_POSITIONS = 256, 1024  # Bounds of a batch's size, where the config leaves it to the data.
_FEWEST_BATCHES = 16  # A length bucket with fewer batches per epoch is not worth compiling programs for.


def batch_rows(recommender: Any, histories: Interactions) -> int:
  """Rows of a training batch: those that a recommender's config names, or else by the size of the data.

  Large batches of packed histories rank better and cost less an epoch, where there are enough for a hundred of them:
  with 256 positions, of some forty users, gradients are noisier than those of as many transitions drawn one by one.
  """
  if recommender.batch_rows:
    return int(recommender.batch_rows)
  if not is_packed(recommender):
    return _FEWEST_POSITIONS
  positions = _FEWEST_POSITIONS
  while positions < _MOST_POSITIONS and _transitions(histories) >= _FEWEST_STEPS * 2 * positions:
    positions *= 2
  return max(1, positions // row_length(recommender))


def _transitions(histories: Interactions) -> int:
  return int(np.maximum(histories.lengths - 1, 0).sum())


def bucket_bounds(recommender: Any, histories: Interactions) -> tuple[int, ...]:
  """The lengths below T that histories are padded to, which are as many programs to compile.

  A length bucket that few batches of an epoch are in is joined with the next. The longest there is, with the one item
  that the test adds to it, is the last of them.

  Args:
    recommender: its config.
    histories: of training.
  """
  lengths = np.minimum(histories.lengths - 1, recommender.max_length)
  longest, kept, low = int(histories.lengths.max()) + 1, [], 0
  for bound in recommender.length_buckets:
    rows = int(np.sum(np.clip(lengths, low, bound) - low))  # Each history gives a row of every length up to its own.
    if bound < min(longest, recommender.max_length) and rows >= _FEWEST_BATCHES * batch_rows(recommender, histories):
      kept.append(bound)
      low = bound
  return (*kept, longest) if recommender.length_buckets and longest < recommender.max_length else tuple(kept)


def ranking_shapes(config: Any, split: Split, *, exact: bool) -> dict[str, Any]:
  """How `evaluate` batches the users of a split: few shapes, as each is a program to compile.

  A search costs the same whatever the length of a history, and takes longer to compile than a short row saves: it has
  one length.

  Args:
    config: of the run.
    split: of its data.
    exact: whether its recommender scores every item.
  """
  return {
    "batch_size": config.evaluation.batch_size,
    "max_length": config.recommender.max_length,
    "bounds": bucket_bounds(config.recommender, split.train) if exact else (),
    "width": ordinary_width(distinct_items(split.history("test"))),
  }


def training_plan(recommender: Any, histories: Interactions) -> tuple[int, int]:
  """Training steps, and steps between two validations, of a recommender's config on training histories."""
  r, rows = recommender, batch_rows(recommender, histories)
  epoch = max(1, -(-_transitions(histories) // (rows * (row_length(r) if is_packed(r) else 1))))
  return r.steps or r.epochs * epoch, r.evaluate_every or 2 * max(epoch, _FEWEST_STEPS)


def training_batches(
  config: Any, histories: Interactions, *, shaped_by: Interactions | None = None, num_devices: int = 1
) -> grain.IterDataset:
  """The input pipeline of the recommender that a config describes.

  Args:
    config: of the run.
    histories: of training.
    shaped_by: histories that hold these, whose batches are to have the same shapes; None: these themselves.
    num_devices: that share the rows of a batch.
  """
  r = config.recommender
  rows = batch_rows(r, shaped_by or histories)
  shape = {"batch_rows": rows, "max_length": r.max_length, "seed": config.seed}
  shape |= {"multiple": num_devices * r.accumulation}
  shape |= {"process_index": jax.process_index(), "process_count": jax.process_count()}
  if not is_packed(r):
    return recommender_batches(PrefixHistories(histories, bounds=bucket_bounds(r, shaped_by or histories), **shape))
  return recommender_batches(PackedHistories(histories, row_length=row_length(r), whole=False, **shape))
