"""Sequence-to-item contrast: InfoNCE whose negatives are the targets of the whole batch, on all devices."""

import jax
import jax.numpy as jnp

from bbqrec_jax.ops.reduction import masked_mean


def normalize(x: jax.Array) -> jax.Array:
  """Rows at unit length, in float32; a zero row stays zero and has a zero gradient."""
  x = x.astype(jnp.float32)
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  # Safe on both branches: the square root's gradient at 0 is infinite.
  return x * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def following(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Where the next item of each position of packed histories stands.

  Args:
    segments: [R, C] int, which history of its row a position belongs to; 0 is padding.

  Returns:
    (place, known), each [R C]: the next item's place among all positions, int, and whether it is the same history's.
  """
  place = jnp.roll(jnp.arange(segments.size, dtype=jnp.int32).reshape(segments.shape), -1, axis=1)
  known = (segments > 0) & (segments == jnp.roll(segments, -1, axis=1))
  return place.reshape(-1), known.at[:, -1].set(False).reshape(-1)


def info_nce(
  queries: jax.Array,
  targets: jax.Array,
  target_ids: jax.Array,
  valid: jax.Array,
  *,
  temperature: float | jax.Array = 0.07,
  axis_name: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """InfoNCE with cosine similarity (van den Oord et al., 2018).

      -log exp(cos(u_i, e_i) / t) / sum_j exp(cos(u_i, e_j) / t)

  where j runs over the targets of the global batch, leaving out those that are the same item as i's own (they would be
  false negatives). Equal in value and gradient to one device that holds the whole batch.

  Args:
    queries: [B, d] sequence states u.
    targets: [B, d] item vectors e; row i is the positive of query i.
    target_ids: [B] int, the items behind `targets`.
    valid: [B] bool; an invalid row is neither a query nor a negative.
    temperature: t, a number or a scalar array if it is learned.
    axis_name: the mapped axis over which the batch is split, or None.

  Returns:
    (loss, aux): this device's share of the mean over valid queries (see `masked_mean`), and `accuracy`, the share of
    queries whose positive scores highest.

  Raises:
    ValueError: if `queries` and `targets` differ in shape.
  """
  if queries.shape != targets.shape:
    raise ValueError(f"queries and targets must have one shape, got {queries.shape} and {targets.shape}")
  # Zeroed before anything is computed: what is NaN in an invalid row would otherwise reach the gradients.
  queries, targets = (normalize(jnp.where(valid[:, None], x, 0.0)) for x in (queries, targets))
  all_targets, all_ids, all_valid = targets, target_ids, valid
  if axis_name is not None:
    all_targets, all_ids, all_valid = (
      jax.lax.all_gather(x, axis_name, tiled=True) for x in (targets, target_ids, valid)
    )
  positive = jnp.sum(queries * targets, axis=-1) / temperature
  scores = jnp.dot(queries, all_targets.T, precision=jax.lax.Precision.HIGHEST) / temperature
  negative = all_valid[None, :] & (target_ids[:, None] != all_ids[None, :])
  scores = jnp.where(negative, scores, -jnp.inf)
  log_normalizer = jnp.logaddexp(positive, jax.nn.logsumexp(scores, axis=-1))
  loss = masked_mean(log_normalizer - positive, valid, axis_name=axis_name)
  accuracy = masked_mean((positive > jnp.max(scores, axis=-1)).astype(jnp.float32), valid, axis_name=axis_name)
  return loss, {"accuracy": accuracy}
