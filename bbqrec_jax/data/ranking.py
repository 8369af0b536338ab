"""Padded histories, one per row, in batches that a model ranks the catalogue for."""

from collections.abc import Iterator

import numpy as np

from bbqrec_jax.data.interactions import Interactions
from bbqrec_jax.data.packing import Batch, elapsed, length_groups


def evaluation_batches(
  histories: Interactions,
  targets: np.ndarray,
  *,
  batch_size: int,
  max_length: int,
  users: np.ndarray | None = None,
) -> Iterator[Batch]:
  """Histories one a row, their last `max_length` items, from the left; the last batch is filled with invalid rows.

  Args:
    histories: the inputs.
    targets: [U] int, the next item of each.
    batch_size: B.
    max_length: T.
    users: [n] int, whose histories, in that order; None: all.

  Yields:
    `items`, `segments`, `positions` [B, T] int32, `targets` [B] int32 and `valid` [B] bool; where the histories have
    times also `times` [B, T] int32, see `packing.elapsed`.
  """
  if users is None:
    users = np.arange(histories.num_users)
  column = np.arange(max_length)
  for first in range(0, len(users), batch_size):
    rows = np.arange(first, first + batch_size)
    valid = rows < len(users)
    rows = users[np.minimum(rows, len(users) - 1)]
    lengths = np.minimum(histories.lengths_of(rows), max_length)[:, None]
    real = (column < lengths) & valid[:, None]
    index = np.minimum(histories.offsets[rows + 1, None] - lengths + column, len(histories.items) - 1)
    batch = {
      "items": np.where(real, histories.items[index], 0).astype(np.int32),
      "segments": real.astype(np.int32),
      "positions": np.where(real, column, 0).astype(np.int32),
      "targets": targets[rows].astype(np.int32),
      "valid": valid,
    }
    if histories.times is not None:
      batch["times"] = np.where(real, elapsed(histories, index, rows[:, None]), 0).astype(np.int32)
    yield batch


# Distinct items that all but the most active users have no more of. A batch of others has fewer rows.
_ORDINARY = 2**10


def ranking_batches(
  histories: Interactions,
  targets: np.ndarray,
  *,
  users: np.ndarray,
  batch_size: int,
  max_length: int,
  bounds: tuple[int, ...] = (),
  exclude: Interactions | None = None,
  width: int = 1,
) -> Iterator[tuple[np.ndarray, Batch]]:
  """What a model ranks the catalogue with, in batches of few shapes, none much larger than the others.

  Users are together whose histories are of about one length: padded to the same of `bounds`, and in its order. Where
  items are left out of their rankings, those that have more than 1,024 of them are apart from the rest: a very active
  user widens no other's row.

  Args:
    histories: the inputs.
    targets: [U] int, the next item of each.
    users: [n] int, who is ranked.
    batch_size: B, users at once; fewer of those with many items.
    max_length: T.
    bounds: lengths, rising, each below T.
    exclude: of the same U users, the items that are left out of each one's ranking, as `distinct_items` gives them.
    width: the least E, as `ordinary_width` gives it for calls that are to have one shape.

  Yields:
    (places, batch): where in `users` those of the first rows are; the other rows only fill the batch. It is as
    `evaluation_batches` gives it, without `valid`, and with `exclude` [B, E] int32 where items are left out: -1 fills.
  """
  lengths = np.minimum(histories.lengths_of(users), max_length)
  counts = np.zeros(len(users), np.int64) if exclude is None else exclude.lengths_of(users)
  for length, group in length_groups(lengths, bounds, max_length):
    for wide, some in _width_groups(counts[group]):
      wide, places = max(wide, width), group[some]
      places = places[np.argsort(lengths[places], kind="stable")]
      rows = max(1, min(batch_size, batch_size * _ORDINARY // wide))
      batches = evaluation_batches(histories, targets, users=users[places], batch_size=rows, max_length=length)
      for first, batch in zip(range(0, len(places), rows), batches, strict=True):
        here = places[first : first + rows]
        del batch["valid"]
        if exclude is not None:
          batch["exclude"] = filled_rows(exclude, users[here], num_rows=rows, width=wide)
        yield here, batch


def _width_groups(counts: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
  """Rows of `counts` [n] items grouped by the power of two that holds them, all up to 1,024 together.

  Yields:
    (the least power of two that holds each of the group, their indices, rising).
  """
  powers = _powers(counts)
  classes = np.maximum(powers, _ORDINARY)
  for kind in np.unique(classes):
    some = np.flatnonzero(classes == kind)
    yield int(powers[some].max()), some


def _powers(counts: np.ndarray) -> np.ndarray:
  """The least power of two that holds each of `counts` [n]."""
  return 1 << np.searchsorted(1 << np.arange(32), counts)


def ordinary_width(exclude: Interactions) -> int:
  """The least power of two that holds the items of each user with no more than 1,024."""
  counts = exclude.lengths
  return int(_powers(counts[counts <= _ORDINARY]).max(initial=1))


def filled_rows(histories: Interactions, users: np.ndarray, *, num_rows: int, width: int) -> np.ndarray:
  """The items of some users as rows.

  Args:
    histories: none of the users' longer than `width`.
    users: [n] int, whose.
    num_rows: B; the rows that are left over stay empty.
    width: E.

  Returns:
    [B, E] int32 filled with -1.
  """
  items = np.full((num_rows, width), -1, np.int32)
  for row, user in enumerate(users):
    own = histories.history(user)
    items[row, : len(own)] = own
  return items
