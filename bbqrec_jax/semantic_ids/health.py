"""Health figures of codebooks and semantic IDs, and warnings where codes are not used."""

from typing import Any

import numpy as np

from bbqrec_jax.semantic_ids.repair import collision_rate


def codebook_health(before: np.ndarray, after: np.ndarray, *, num_codes: int) -> dict[str, Any]:
  """Use of each level over the catalogue, and collisions before and after repair.

  Args:
    before: [N, L] int, the quantizer's codes.
    after: [N, L] int, the repaired ones.
    num_codes: K.

  Returns:
    `usage` [L], the share of the K codes in use; `perplexity` [L], the exponential of the entropy of code use; `dead`
    [L], codes that no item uses; all three before repair. `collision_rate_before` and `collision_rate_after`: the share
    of items that are not the first holder of their ID. `prefix_distinct` [L]: distinct prefixes of each length over
    items, before repair. `moved`: how many items the repair gave another ID.
  """
  usage, perplexities, dead, distinct = [], [], [], []
  for level in range(before.shape[1]):
    counts = np.bincount(before[:, level], minlength=num_codes)
    share = counts[counts > 0] / counts.sum()
    usage.append(float(np.mean(counts > 0)))
    perplexities.append(float(np.exp(-np.sum(share * np.log(share)))))
    dead.append(int(np.sum(counts == 0)))
    distinct.append(len(np.unique(before[:, : level + 1], axis=0)) / len(before))
  return {
    "items": len(before),
    "num_codes": num_codes,
    "usage": usage,
    "perplexity": perplexities,
    "dead": dead,
    "prefix_distinct": distinct,
    "collision_rate_before": collision_rate(before),
    "collision_rate_after": collision_rate(after),
    "moved": int(np.sum(np.any(before != after, axis=1))),
  }


def linear_r2(x: np.ndarray, y: np.ndarray) -> float:
  """How much of `y` a linear map of `x` tells: the R^2 on odd rows of a least-squares fit to the even ones.

  Args:
    x: [n, d] float.
    y: [n, e] float.

  Returns:
    1 where y follows from x, about 0 where x says nothing, and less where the fit does not carry over to other rows;
    NaN where there are too few rows or y does not vary.
  """
  x = np.concatenate([x, np.ones((len(x), 1))], axis=1).astype(np.float64)
  y = y.astype(np.float64)
  if len(x) < 4 * x.shape[1]:
    return float("nan")
  # A ridge far below the data's own scale keeps constant columns from making the system singular.
  gram = x[::2].T @ x[::2]
  weights = np.linalg.solve(gram + 1e-6 * np.trace(gram) / len(gram) * np.eye(len(gram)), x[::2].T @ y[::2])
  rest = np.square(y[1::2] - x[1::2] @ weights).sum()
  spread = np.square(y[1::2] - y[::2].mean(axis=0)).sum()
  return float(1.0 - rest / spread) if spread > 0 else float("nan")


def format_health(health: dict[str, Any]) -> str:
  """A table, a line a level, and a warning in words for each level that uses under half of its reachable codes."""
  lines = ["level  codes used  perplexity  dead  distinct prefixes"]
  warnings = []
  # A catalogue smaller than a level cannot use all of its codes, and is not told that it should.
  reachable = min(health["num_codes"], health["items"])
  for level, usage in enumerate(health["usage"]):
    used = round(usage * health["num_codes"])
    lines.append(
      f"{level + 1:5d}  {used:4d} = {usage:4.0%}  {health['perplexity'][level]:10.1f}  {health['dead'][level]:4d}"
      f"  {health['prefix_distinct'][level]:17.1%}"
    )
    if used < 0.5 * reachable:
      warnings.append(f"warning: level {level + 1} uses {used} of {reachable} codes: the codebook has collapsed")
  lines.append(
    f"collisions {health['collision_rate_before']:.1%} before repair, {health['collision_rate_after']:.1%} after"
    f" ({health['moved']} items moved)"
  )
  if "cohesion" in health:
    cohesion = health["cohesion"]
    lines.append(
      f"held-out next items that share the first code: {cohesion['level1']:.1%} (by chance {cohesion['floor1']:.1%}, in"
      f" training {cohesion['training1']:.1%}), the first two: {cohesion['level2']:.1%} ({cohesion['floor2']:.1%},"
      f" {cohesion['training2']:.1%})"
    )
  if health.get("contrast_recall@10") is not None:
    lines.append(f"sequence-to-item Recall@10 on validation: {health['contrast_recall@10']:.4f}")
  for name, error in health.get("reconstruction", {}).items():
    lines.append(
      f"reconstruction of {name}: mean squared error {error:.3f}, from the ID's codes alone"
      f" {health['reconstruction_from_codes'][name]:.3f} (1 is the mean of the features)"
    )
  return "\n".join(lines + warnings)


def behaviour_cohesion(codes: np.ndarray, previous: np.ndarray, following: np.ndarray) -> dict[str, float]:
  """How often two items that follow one another share their ID's first code, and their first two.

  Args:
    codes: [N, L] int, L >= 1.
    previous: [n] int, items.
    following: [n] int, the item that came after each; held out, if the figure is to say anything of learning.

  Returns:
    `level1` and `level2`, the shares; `floor1` and `floor2`, the same if the following items were shuffled (in
    expectation, so without noise): a codebook that uses few codes has a high floor. With one level, both are level 1.
    Of no pairs all are 0.
  """
  result, pairs = {}, max(1, len(previous))
  for name, levels in (("1", 1), ("2", min(2, codes.shape[1]))):
    _, prefix = np.unique(codes[:, :levels], axis=0, return_inverse=True)
    before, after = prefix.reshape(-1)[previous], prefix.reshape(-1)[following]
    shares = [np.bincount(side, minlength=prefix.max() + 1) / pairs for side in (before, after)]
    result[f"level{name}"] = float(np.sum(before == after) / pairs)
    result[f"floor{name}"] = float(np.dot(*shares))
  return result
