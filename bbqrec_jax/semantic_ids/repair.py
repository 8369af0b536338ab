"""Collision repair: every item its own semantic ID, as near as can be to what the quantizer chose."""

import numpy as np

from bbqrec_jax.errors import InputError


def collision_rate(codes: np.ndarray) -> float:
  """Share of items that are not the first holder of their ID, 1 - distinct / items (MQL4GRec's and LC-Rec's figure)."""
  return 1.0 - len(np.unique(codes, axis=0)) / len(codes)


def reassign_collisions(codes: np.ndarray, latents: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
  """Gives each item of a shared ID but one the nearest free ID.

  The item nearest to its codewords keeps the ID. Each other one, nearest first, takes the nearest free last-level code
  under its own prefix; when that prefix is full, the next-nearest code of the level above, and so on. Items whose ID is
  theirs alone never change. Deterministic: ties go to the lower item, then to the lower code.

  Args:
    codes: [N, L] int, the codes of the latents.
    latents: [N, d] float, what was quantized.
    codebooks: [L, K, d].

  Returns:
    [N, L] int32 with N distinct rows.

  Raises:
    InputError: if N exceeds the K**L IDs that exist.
  """
  num_items, num_levels = codes.shape
  num_codes = codebooks.shape[1]
  if num_items > num_codes**num_levels:
    raise InputError(
      f"{num_items} items cannot each have their own semantic ID: {num_levels} levels of {num_codes} codes make"
      f" {num_codes**num_levels}; raise tokenizer.num_levels or tokenizer.num_codes"
    )
  repaired = codes.astype(np.int32).copy()
  quantized = sum(codebooks[level][codes[:, level]] for level in range(num_levels))
  error = np.sum(np.square(latents - quantized), axis=-1)
  order = np.lexsort((np.arange(num_items), error))
  _, owner = np.unique(repaired[order], axis=0, return_index=True)
  keeps = np.zeros(num_items, bool)
  keeps[order[owner]] = True

  # How many items stand under each prefix of each length: a prefix of length n is full at K ** (L - n).
  held: list[dict[tuple[int, ...], int]] = []
  for length in range(1, num_levels + 1):
    prefixes, counts = np.unique(repaired[keeps][:, :length], axis=0, return_counts=True)
    held.append({tuple(prefix): int(count) for prefix, count in zip(prefixes.tolist(), counts, strict=True)})

  def place(item: int, residual: np.ndarray, prefix: tuple[int, ...]) -> tuple[int, ...]:
    level = len(prefix)
    distance = np.sum(np.square(codebooks[level] - residual), axis=-1)
    if prefix == tuple(codes[item, :level]):
      distance[codes[item, level]] = -1.0  # Its own code first, whatever chose it: rounding, or a balanced assignment.
    for code in np.argsort(distance, kind="stable").tolist():
      candidate = (*prefix, code)
      if held[level].get(candidate, 0) >= num_codes ** (num_levels - level - 1):
        continue
      return candidate if level + 1 == num_levels else place(item, residual - codebooks[level][code], candidate)
    raise AssertionError("a prefix with room has no free code")  # The capacity check above rules it out.

  for item in order[~keeps[order]]:
    chosen = place(item, latents[item], ())
    repaired[item] = chosen
    for length in range(1, num_levels + 1):
      held[length - 1][chosen[:length]] = held[length - 1].get(chosen[:length], 0) + 1
  return repaired
