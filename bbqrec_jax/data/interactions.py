"""Users' histories as flat arrays, and the leave-one-out split of the field."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from bbqrec_jax.errors import InputError

# One item to learn from, one to validate on, one to test on: who has fewer is learned from alone.
MINIMUM_LENGTH = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Interactions:
  """The histories of U users, one after another.

  Attributes:
    items: [total] int32 item ids, in time order within a user.
    offsets: [U + 1] int64; the history of user u is items[offsets[u]:offsets[u + 1]].
    users: [U] str, the labels that the source gives the users.
    times: [total] float64, the second of each interaction since any fixed moment; None where the source has none.
  """

  items: np.ndarray
  offsets: np.ndarray
  users: np.ndarray
  times: np.ndarray | None = None

  @property
  def num_users(self) -> int:
    """U."""
    return len(self.users)

  @property
  def num_interactions(self) -> int:
    """The total over all users."""
    return len(self.items)

  @property
  def lengths(self) -> np.ndarray:
    """[U] int64, the number of interactions of each user."""
    return np.diff(self.offsets)

  def lengths_of(self, users: np.ndarray) -> np.ndarray:
    """The same of some users [n] alone."""
    return self.offsets[users + 1] - self.offsets[users]

  def history(self, user: int) -> np.ndarray:
    """The items of user number `user` in time order, a view of [length] int32."""
    return self.items[self.offsets[user] : self.offsets[user + 1]]


def order_note(interactions: Interactions) -> str:
  """How the histories came into their order, in words."""
  return f"histories ordered {'as in the file, without timestamps' if interactions.times is None else 'by timestamp'}"


def from_lengths(
  items: np.ndarray, lengths: np.ndarray, users: np.ndarray, times: np.ndarray | None = None
) -> Interactions:
  """Interactions from the flat items [total] (and their times), and each user's number of them [U]."""
  return Interactions(items.astype(np.int32), np.append(0, np.cumsum(lengths, dtype=np.int64)), users, times)


def choose(interactions: Interactions, kept: np.ndarray, lengths: np.ndarray, users: np.ndarray) -> Interactions:
  """Some of the interactions.

  Args:
    interactions: all.
    kept: of the flat arrays, indices [n] or bool [total].
    lengths: [U] how many of them each user has.
    users: [U] labels.
  """
  times = None if interactions.times is None else interactions.times[kept]
  return from_lengths(interactions.items[kept], lengths, users, times)


def drop_short_users(interactions: Interactions, minimum: int = MINIMUM_LENGTH) -> Interactions:
  """Only the users with at least `minimum` interactions, in the same order."""
  lengths = interactions.lengths
  keep = lengths >= minimum
  return choose(interactions, np.repeat(keep, lengths), lengths[keep], interactions.users[keep])


def require_users(interactions: Interactions, *, path: str | Path) -> Interactions:
  """The interactions, if there are any users.

  Raises:
    InputError: if there is none; names the file that they were read from.
  """
  if not interactions.num_users:
    raise InputError(f"{path}: expected at least one user, found none; give a file that holds interactions")
  return interactions


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """What is learned from, and what is held out of it; of `leave_one_out` unless `shown` says otherwise.

  Attributes:
    train: the only interactions that anything is fitted on; of leave-one-out everything but each user's last two items.
    validation_target: [V] int32, what really came after the histories that are shown at validation.
    test_target: [T] int32, likewise at test.
    split_hash: 16 hexadecimal digits that change with any interaction, their order, or the protocol.
    validation_time: [V] float64, when the validation target came; None where the source has no times.
    kind: "leave-one-out", "temporal" or "none".
    shown: the histories that a model is shown at "validation" (of V users) and "test" (of T); None for leave-one-out,
      where they are those of all U users, unless some are too short to be ranked.
  """

  train: Interactions
  validation_target: np.ndarray
  test_target: np.ndarray
  split_hash: str
  validation_time: np.ndarray | None = None
  kind: str = "leave-one-out"
  shown: Mapping[str, Interactions] | None = None

  def history(self, stage: str) -> Interactions:
    """What a model is shown at "validation" or "test": of leave-one-out the training part, and all but the last item.

    Raises:
      InputError: if the stage is neither.
    """
    if stage not in ("validation", "test"):
      raise InputError(f"expected stage 'validation' or 'test', got {stage!r}")
    if self.shown is not None:
      return self.shown[stage]
    if stage == "validation":
      return self.train
    ends = self.train.offsets[1:]
    items, times = np.insert(self.train.items, ends, self.validation_target), self.train.times
    if times is not None and self.validation_time is not None:
      times = np.insert(times, ends, self.validation_time)
    return from_lengths(items, self.train.lengths + 1, self.train.users, times)


def leave_one_out(interactions: Interactions) -> Split:
  """Splits each history in time order, as SASRec, TIGER and their successors do.

  Users with fewer than 3 interactions are learned from, and never ranked: one each is needed to learn from, to validate
  on and to test on.

  Returns:
    The split, with the users in the same order.

  Raises:
    InputError: if no user has 3 interactions.
  """
  lengths = interactions.lengths
  ranked = lengths >= MINIMUM_LENGTH
  if not ranked.any():
    raise InputError(
      f"expected users with at least {MINIMUM_LENGTH} interactions (one each to learn from, validate on and test on),"
      f" none of the {len(lengths)} users has as many; give longer histories"
    )
  last = interactions.offsets[1:][ranked] - 1
  held = np.zeros(interactions.num_interactions, bool)
  held[last] = held[last - 1] = True
  train, shown = choose(interactions, ~held, lengths - 2 * ranked, interactions.users), None
  if not ranked.all():
    whole, users = np.repeat(ranked, lengths), interactions.users[ranked]
    at_test = whole.copy()
    at_test[last] = False
    shown = {
      "validation": choose(interactions, whole & ~held, lengths[ranked] - 2, users),
      "test": choose(interactions, at_test, lengths[ranked] - 1, users),
    }
  digest = hashlib.sha256(b"leave-one-out")
  digest.update(lengths.astype("<i8").tobytes())
  digest.update(interactions.items.astype("<i4").tobytes())
  return Split(
    train=train,
    validation_target=interactions.items[last - 1],
    test_target=interactions.items[last],
    split_hash=digest.hexdigest()[:16],
    validation_time=None if interactions.times is None else interactions.times[last - 1],
    shown=shown,
  )


def hold_out_last(split: Split, *, count: int, seed: int, among: np.ndarray | None = None) -> tuple[Split, np.ndarray]:
  """The same protocol one step earlier, for some users: their last training item is what there is to predict.

  Args:
    split: of which the training histories count.
    count: users at most whose last item is held out, drawn from those with two training interactions or more.
    seed: of the draw.
    among: [U] bool, the users to draw from; None: all.

  Returns:
    The split, whose targets mean nothing for other users, and the users, [n] int ascending.
  """
  train, users = split.train, np.flatnonzero((split.train.lengths >= 2) & (True if among is None else among))
  if len(users) > count:
    users = np.sort(np.random.default_rng([seed, 11]).choice(users, count, replace=False))
  last = train.offsets[1:][users] - 1
  kept, lengths, target = np.ones(train.num_interactions, bool), train.lengths, np.zeros(train.num_users, np.int32)
  kept[last] = False
  lengths[users] -= 1
  target[users] = train.items[last]
  return Split(choose(train, kept, lengths, train.users), target, target, f"{split.split_hash}-1"), users


def temporal(interactions: Interactions, *, validation_from: float | None, test_from: float | None) -> Split:
  """Splits at two moments, the same for everybody: nothing is learned from what came after the first.

  A user's target is the first item from the moment on, and what is shown are all items before the moment. Users without
  an item in the time of a stage, or without one before the first moment, are not ranked there; users of the latter kind
  are in no part at all.

  Args:
    interactions: with times.
    validation_from: second from which on interactions validate; None: that of the interaction at 80 % of them by time.
    test_from: second from which on they test; None: that at 90 %.

  Raises:
    InputError: if there are no times, or a part is left without a user.
  """
  times = interactions.times
  if times is None:
    raise InputError(
      "data.split = 'temporal': expected times of the interactions, found none; give them, or use another"
    )
  in_order = np.sort(times)
  first, second = (
    float(in_order[len(in_order) * share // 10] if given is None else given)
    for given, share in ((validation_from, 8), (test_from, 9))
  )
  if not first < second:
    raise InputError(
      f"data.validation_from: expected it before data.test_from, got second {first:.15g} and {second:.15g}; give both"
    )
  owner = np.repeat(np.arange(interactions.num_users), interactions.lengths)

  def count(chosen: np.ndarray) -> np.ndarray:
    return np.bincount(owner[chosen], minlength=interactions.num_users)

  before, until = times < first, times < second
  known, early = count(before), count(until)
  starts = interactions.offsets[:-1]
  validated = np.flatnonzero((known > 0) & (early > known))
  tested = np.flatnonzero((known > 0) & (interactions.lengths > early))
  for name, users in (("learn from", np.flatnonzero(known > 1)), ("validate on", validated), ("test on", tested)):
    if not len(users):
      raise InputError(
        f"data.split = 'temporal': expected users to {name}, found none with validation from second {first:.15g} and"
        f" test from {second:.15g} on; set data.validation_from and data.test_from"
      )
  kept = known > 0
  train = choose(interactions, before, known[kept], interactions.users[kept])

  def shown(users: np.ndarray, mine: np.ndarray, lengths: np.ndarray) -> Interactions:
    chosen = np.zeros(interactions.num_users, bool)
    chosen[users] = True
    return choose(interactions, mine & chosen[owner], lengths[users], interactions.users[users])

  digest = hashlib.sha256(f"temporal {first!r} {second!r}".encode())
  for part in (interactions.lengths.astype("<i8"), interactions.items.astype("<i4"), times.astype("<f8")):
    digest.update(part.tobytes())
  return Split(
    train=train,
    validation_target=interactions.items[(starts + known)[validated]],
    test_target=interactions.items[(starts + early)[tested]],
    split_hash=digest.hexdigest()[:16],
    validation_time=times[(starts + known)[validated]],
    kind="temporal",
    shown={"validation": shown(validated, before, known), "test": shown(tested, until, early)},
  )


def without_split(interactions: Interactions) -> Split:
  """Everything is learned from, for production; what is "held out" are the last items, which the model has seen.

  Figures on them tell that a model works, and nothing of how well.

  Raises:
    InputError: if no user has two items.
  """
  lengths = interactions.lengths
  several = np.flatnonzero(lengths > 1)
  if not len(several):
    raise InputError("data.split = 'none': expected users with two items or more, found none; give longer histories")
  last = np.zeros(interactions.num_interactions, bool)
  last[interactions.offsets[1:][lengths > 0] - 1] = True
  long_enough = np.repeat(lengths > 1, lengths)
  shown = choose(interactions, long_enough & ~last, lengths[several] - 1, interactions.users[several])
  target = interactions.items[long_enough & last]
  digest = hashlib.sha256(b"none")
  digest.update(lengths.astype("<i8").tobytes())
  digest.update(interactions.items.astype("<i4").tobytes())
  return Split(
    train=interactions,
    validation_target=target,
    test_target=target,
    split_hash=digest.hexdigest()[:16],
    validation_time=None if interactions.times is None else interactions.times[long_enough & last],
    kind="none",
    shown={"validation": shown, "test": shown},
  )


def without_times(split: Split) -> Split:
  """The same split of interactions without times."""
  shown = None if split.shown is None else {stage: _timeless(histories) for stage, histories in split.shown.items()}
  return dataclasses.replace(split, train=_timeless(split.train), validation_time=None, shown=shown)


def _timeless(interactions: Interactions) -> Interactions:
  return dataclasses.replace(interactions, times=None)


# Interactions of a block of users.
_BLOCK = 2**22


def user_blocks(interactions: Interactions) -> Iterator[slice]:
  """Slices that cover the users, each of as many as have about 4 million interactions together, or of one with more."""
  offsets, first = interactions.offsets, 0
  while first < interactions.num_users:
    last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + _BLOCK, side="right")) - 1)
    yield slice(first, last)
    first = last


def distinct_items(interactions: Interactions) -> Interactions:
  """Each user's items, each once and ascending, without times; made a block of users at a time."""
  parts, counts = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
  for users in user_blocks(interactions):
    offsets = interactions.offsets[users.start : users.stop + 1]
    items = interactions.items[offsets[0] : offsets[-1]]
    if len(offsets) == 2:
      own = np.unique(items)
      lengths = np.array([len(own)])
    else:
      base = int(items.max(initial=0)) + 1
      owners, own = np.divmod(np.unique(np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)) * base + items), base)
      lengths = np.bincount(owners, minlength=len(offsets) - 1)
    parts.append(own.astype(np.int32))
    counts.append(lengths)
  return from_lengths(np.concatenate(parts), np.concatenate(counts), interactions.users)


def nobodys_items(interactions: Interactions) -> Interactions:
  """The same users with no items at all."""
  return from_lengths(np.zeros(0, np.int32), np.zeros(interactions.num_users, np.int64), interactions.users)


def select_users(interactions: Interactions, users: np.ndarray) -> Interactions:
  """The histories of the given user numbers [n], in that order."""
  lengths = interactions.lengths[users]
  within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
  kept = np.repeat(interactions.offsets[:-1][users], lengths) + within
  return choose(interactions, kept, lengths, interactions.users[users])
