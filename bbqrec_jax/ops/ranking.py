"""Full-catalogue ranking metrics. Each metric is a (sum, count) pair: add the pairs of all batches, divide once."""

import jax
import jax.numpy as jnp
import numpy as np

Metric = tuple[jax.Array, jax.Array]
MISS = int(np.iinfo(np.int32).max)  # The rank of a target that a list does not hold.


def target_ranks(scores: jax.Array, targets: jax.Array) -> jax.Array:
  """How many items stand before the target; 0 is best.

  Ties count against the target, and so does NaN: a broken model never looks good.

  Args:
    scores: [B, N] float, higher is better.
    targets: [B] int, the item that was really next.

  Returns:
    [B] int32 in 0..N-1.
  """
  own = jnp.take_along_axis(scores, targets[:, None], axis=1)
  return scores.shape[1] - 1 - jnp.sum(scores < own, axis=1, dtype=jnp.int32)


def expected_hits(scores: jax.Array, targets: jax.Array, *, k: int, tolerance: float = 0.0) -> jax.Array:
  """How often the target is among the first k where ties stand in random order.

  For comparing representations, where some cannot tell items apart that others can; NaN counts against the target.

  Args:
    scores: [B, N] float, higher is better.
    targets: [B] int.
    k: length of the list.
    tolerance: scores that differ by no more are tied.

  Returns:
    [B] float32 in 0..1.
  """
  own = jnp.take_along_axis(scores, targets[:, None], axis=1)
  before = jnp.sum(~(scores <= own + tolerance), axis=1, dtype=jnp.int32)
  tied = jnp.sum(jnp.abs(scores - own) <= tolerance, axis=1, dtype=jnp.int32)
  return jnp.clip((k - before).astype(jnp.float32) / jnp.maximum(tied, 1).astype(jnp.float32), 0.0, 1.0)


def ranks_in_list(items: jax.Array, scores: jax.Array, targets: jax.Array) -> jax.Array:
  """Rank of each target in a list of distinct items.

  Ties count against the target, and so does NaN, as in `target_ranks`.

  Args:
    items: [B, W] int; -1 fills a short list.
    scores: [B, W] float of these items, higher is better; -inf where there is none.
    targets: [B] int.

  Returns:
    [B] int32; the largest int32 where the list does not hold the target, or holds it without a score: a miss at every
    k.
  """
  found = items == targets[:, None]
  own = jnp.max(jnp.where(found, scores, -jnp.inf), axis=1, keepdims=True)
  before = jnp.sum((items >= 0) & ~(scores < own), axis=1, dtype=jnp.int32) - 1
  return jnp.where(jnp.any(found, axis=1) & ~jnp.isnan(own[:, 0]), before, MISS).astype(jnp.int32)


def each_once(items: jax.Array) -> jax.Array:
  """Items [..., E], sorted, where -1 stands in place of all but one of equal ones; -1 may be there before."""
  items = jnp.sort(items, axis=-1)
  repeated = jnp.concatenate([jnp.zeros_like(items[..., :1], bool), items[..., 1:] == items[..., :-1]], axis=-1)
  return jnp.where(repeated, -1, items)


def _places(scores: jax.Array, items: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Where the scores [B, N] of items [B, E] stand; past the end where -1 fills, which drops what is put there."""
  return jnp.arange(scores.shape[0], dtype=jnp.int32)[:, None], jnp.where(items < 0, scores.shape[1], items)


def without(scores: jax.Array, excluded: jax.Array) -> jax.Array:
  """Scores [B, N] with those of `excluded`, [B, E] int items where -1 fills, at minus infinity."""
  return scores.at[_places(scores, excluded)].set(-jnp.inf, mode="drop")


def add_to(scores: jax.Array, items: jax.Array, by: jax.Array) -> jax.Array:
  """Scores [B, N] with `by`, a number, added to those of items [B, E] int, each there once; -1 fills."""
  return scores.at[_places(scores, items)].add(by, mode="drop")


def recall_at(ranks: jax.Array, valid: jax.Array, k: int) -> Metric:
  """Share of users whose target is among the first k: ranks [B], valid [B] bool -> (sum, count)."""
  return jnp.sum(valid & (ranks < k), dtype=jnp.float32), jnp.sum(valid, dtype=jnp.float32)


def ndcg_at(ranks: jax.Array, valid: jax.Array, k: int) -> Metric:
  """Normalised discounted cumulative gain for one relevant item: 1 / log2(rank + 2) within the first k, else 0."""
  gain = 1.0 / jnp.log2(ranks.astype(jnp.float32) + 2.0)
  return jnp.sum(jnp.where(valid & (ranks < k), gain, 0.0)), jnp.sum(valid.astype(jnp.float32))


def user_ndcg(ranks: np.ndarray, k: int = 10) -> np.ndarray:
  """The same of each user: ranks of any shape -> float64, on the host, to compare user by user."""
  return np.where(ranks < k, 1.0 / np.log2(np.minimum(ranks, k).astype(np.float64) + 2.0), 0.0)


def reciprocal_rank(ranks: jax.Array, valid: jax.Array) -> Metric:
  """Mean reciprocal rank, 1 / (rank + 1); a miss (see `ranks_in_list`) counts 0."""
  gain = jnp.where(ranks < MISS, 1.0 / (ranks.astype(jnp.float32) + 1.0), 0.0)
  return jnp.sum(jnp.where(valid, gain, 0.0)), jnp.sum(valid.astype(jnp.float32))


RECALL_CUTOFFS = (1, 5, 10, 20)
NDCG_CUTOFFS = (5, 10, 20)
LARGEST_CUTOFF = max(*RECALL_CUTOFFS, *NDCG_CUTOFFS)


def ranking_metrics(ranks: jax.Array, valid: jax.Array) -> dict[str, Metric]:
  """Recall@{1,5,10,20}, NDCG@{5,10,20} and MRR of one batch, each a (sum, count)."""
  metrics = {f"recall@{k}": recall_at(ranks, valid, k) for k in RECALL_CUTOFFS}
  metrics |= {f"ndcg@{k}": ndcg_at(ranks, valid, k) for k in NDCG_CUTOFFS}
  return metrics | {"mrr": reciprocal_rank(ranks, valid)}
