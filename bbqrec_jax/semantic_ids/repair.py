"""Collision repair: gives every item a semantic ID of its own, as near as possible to the quantizer's."""

import numpy as np

from bbqrec_jax.errors import InputError


def collision_rate(codes: np.ndarray) -> float:
  """Share of items that are not the first holder of their ID, 1 - distinct / items (MQL4GRec's and LC-Rec's figure)."""
  return 1.0 - len(np.unique(codes, axis=0)) / len(codes)


def check_capacity(num_items: int, num_levels: int, num_codes: int) -> None:
  """Refuses a catalogue that the IDs cannot tell apart.

  Raises:
    InputError: if `num_items` exceeds the K**L IDs that exist.
  """
  if num_items > num_codes**num_levels:
    raise InputError(
      f"{num_items} items cannot each have their own semantic ID: {num_levels} levels of {num_codes} codes make"
      f" {num_codes**num_levels}; train a tokenizer with a higher tokenizer.num_levels or tokenizer.num_codes"
    )


class _Prefixes:
  """How many items stand under each prefix; memory is of the order of the items, whatever K**L is."""

  def __init__(self, codes: np.ndarray, num_codes: int):
    self._num_codes = num_codes
    self._keys: list[np.ndarray] = []
    self._added: list[dict[int, int]] = []
    self._counts: list[list[int]] = []
    parent = np.zeros(len(codes), np.int64)
    for level in range(codes.shape[1]):
      keys, parent, counts = np.unique(parent * num_codes + codes[:, level], return_inverse=True, return_counts=True)
      parent = parent.reshape(-1)
      self._keys.append(keys)
      self._added.append({})
      self._counts.append(counts.tolist())

  def child(self, level: int, parent: int, code: int) -> int:
    """The number of a prefix among those of its length, -1 if no item stands under it."""
    key = parent * self._num_codes + code
    keys = self._keys[level]
    place = int(np.searchsorted(keys, key))
    return place if place < len(keys) and keys[place] == key else self._added[level].get(key, -1)

  def count(self, level: int, parent: int, code: int) -> int:
    """How many items stand under it."""
    number = self.child(level, parent, code) if parent >= 0 else -1
    return self._counts[level][number] if number >= 0 else 0

  def add(self, codes: tuple[int, ...]) -> None:
    """Counts one more item."""
    parent = 0
    for level, code in enumerate(codes):
      number = self.child(level, parent, code)
      if number < 0:
        number = len(self._counts[level])
        self._added[level][parent * self._num_codes + code] = number
        self._counts[level].append(0)
      self._counts[level][number] += 1
      parent = number


def reassign_collisions(
  codes: np.ndarray, latents: np.ndarray, codebooks: np.ndarray, *, taken: np.ndarray | None = None
) -> np.ndarray:
  """Gives each item of a shared ID but one the nearest free ID.

  The item nearest to its codewords keeps the ID. Each other one, nearest first, takes the nearest free last-level code
  under its own prefix; when that prefix is full, the next-nearest code of the level above, and so on. Items whose ID is
  theirs alone never change. Deterministic: ties go to the lower item, then to the lower code.

  Args:
    codes: [N, L] int, the codes of the latents.
    latents: [N, d] float, what was quantized.
    codebooks: [L, K, d].
    taken: [n, L] int distinct IDs that other items hold already, or None.

  Returns:
    [N, L] int32 with N distinct rows, none of them in `taken`.

  Raises:
    InputError: if all the items exceed the K**L IDs that exist.
  """
  num_items, num_levels = codes.shape
  num_codes = codebooks.shape[1]
  taken = np.zeros((0, num_levels), np.int32) if taken is None else taken.astype(np.int32)
  check_capacity(num_items + len(taken), num_levels, num_codes)
  repaired = codes.astype(np.int32).copy()
  error = np.sum(np.square(latents - _decode(codes, codebooks)), axis=-1)
  order = np.lexsort((np.arange(num_items), error))
  # IDs that are taken come first, so that no item is the first holder of one of them.
  _, owner = np.unique(np.concatenate([taken, repaired[order]]), axis=0, return_index=True)
  keeps = np.zeros(num_items, bool)
  keeps[order[owner[owner >= len(taken)] - len(taken)]] = True
  held = _Prefixes(np.concatenate([taken, repaired[keeps]]), num_codes)

  def place(item: int, residual: np.ndarray, prefix: tuple[int, ...], parent: int) -> tuple[int, ...]:
    level = len(prefix)
    distance = np.sum(np.square(codebooks[level] - residual), axis=-1)
    if prefix == tuple(codes[item, :level]):
      distance[codes[item, level]] = -1.0  # Its own code first, whatever chose it: rounding, or another quantizer.
    for code in np.argsort(distance, kind="stable").tolist():
      if held.count(level, parent, code) >= num_codes ** (num_levels - level - 1):
        continue
      candidate = (*prefix, code)
      if level + 1 == num_levels:
        return candidate
      below = held.child(level, parent, code) if parent >= 0 else -1
      return place(item, residual - codebooks[level][code], candidate, below)
    raise AssertionError("a prefix with room has no free code")  # The capacity check above rules it out.

  for item in order[~keeps[order]]:
    chosen = place(item, latents[item], (), 0)
    repaired[item] = chosen
    held.add(chosen)
  return repaired


def _decode(codes: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
  total = codebooks[0][codes[:, 0]]
  for level in range(1, codes.shape[1]):
    total = total + codebooks[level][codes[:, level]]
  return total


def suffix_collisions(codes: np.ndarray, *, num_codes: int, taken: np.ndarray | None = None) -> np.ndarray:
  """Appends a level that counts the items of one ID: 0 for the first, 1 for the second, and so on (TIGER's repair).

  Args:
    codes: [N, L] int.
    num_codes: K, of the new level too.
    taken: [n, L + 1] int distinct IDs that other items hold already, or None; counting goes on where they end.

  Returns:
    [N, L + 1] int32 with N distinct rows, none of them in `taken`.

  Raises:
    InputError: if more than K items share an ID.
  """
  taken = np.zeros((0, codes.shape[1] + 1), np.int32) if taken is None else taken.astype(np.int32)
  together = np.concatenate([taken[:, :-1], codes.astype(np.int32)])
  _, group = np.unique(together, axis=0, return_inverse=True)
  group = group.reshape(-1)
  following = np.zeros(group.max() + 1, np.int64)
  np.maximum.at(following, group[: len(taken)], taken[:, -1].astype(np.int64) + 1)
  mine = group[len(taken) :]
  order = np.argsort(mine, kind="stable")
  starts = np.searchsorted(mine[order], mine[order])
  suffix = np.empty(len(mine), np.int64)
  suffix[order] = np.arange(len(mine)) - starts
  suffix += following[mine]
  if len(suffix) and suffix.max() >= num_codes:
    raise InputError(
      f"{int(suffix.max()) + 1} items share the ID {codes[int(np.argmax(suffix))].tolist()}, and a suffix can tell"
      f" {num_codes} apart; train a tokenizer with tokenizer.repair=reassign, or a higher tokenizer.num_codes, in"
      " another workdir"
    )
  return np.concatenate([codes.astype(np.int32), suffix[:, None].astype(np.int32)], axis=1)
