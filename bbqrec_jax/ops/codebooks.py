"""Upkeep of a codebook beside the loss: counts, perplexity, moving averages, and revival of codes out of use."""

import jax
import jax.numpy as jnp


def code_counts(codes: jax.Array, num_codes: int, *, weights: jax.Array | None = None) -> jax.Array:
  """How often each code occurs: codes [B] int, weights [B] or None for 1 each -> [K] float32."""
  weights = jnp.ones(codes.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
  return jnp.zeros(num_codes, jnp.float32).at[codes].add(weights)


def perplexity(counts: jax.Array) -> jax.Array:
  """Exponential of the entropy of code use: [..., K] -> [...]; K when all are used alike, 1 when one code is."""
  share = counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1e-12)
  return jnp.exp(-jnp.sum(share * jnp.log(jnp.maximum(share, 1e-12)), axis=-1))


def revive_codes(
  key: jax.Array, codebook: jax.Array, usage: jax.Array, residuals: jax.Array, valid: jax.Array, threshold: float
) -> tuple[jax.Array, jax.Array]:
  """Moves the codewords of one level that are hardly chosen any more to randomly drawn live residuals.

  Args:
    key: random key, the same on every device.
    codebook: [K, d].
    usage: [K] float32, a moving average of each code's share of the choices; sums to about 1.
    residuals: [B, d] what this level was given in this step (on every device: all of them).
    valid: [B] bool, the rows that may be drawn.
    threshold: a code whose share is under `threshold / K` is moved; 0 moves none.

  Returns:
    The codebook, and `usage` with the moved codes back at 1 / K. Nothing moves where no row is valid.
  """
  num_codes = codebook.shape[0]
  # A random order with the valid rows first: two dead codes take two rows, while there are as many.
  order = jnp.argsort(jnp.where(valid, jax.random.uniform(key, valid.shape, jnp.float32), 2.0))
  dead = (usage < threshold / num_codes) & jnp.any(valid)
  turn = jnp.cumsum(dead, dtype=jnp.int32) - 1
  rows = order[turn % jnp.maximum(jnp.sum(valid, dtype=jnp.int32), 1)]
  codebook = jnp.where(dead[:, None], residuals[rows].astype(codebook.dtype), codebook)
  return codebook, jnp.where(dead, 1.0 / num_codes, usage)


def moving_average(
  codebook: jax.Array,
  mass: jax.Array,
  total: jax.Array,
  codes: jax.Array,
  residuals: jax.Array,
  valid: jax.Array,
  *,
  decay: float,
  axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Moves the codewords of one level to the mean of what chose them lately (van den Oord et al., 2017).

  Args:
    codebook: [K, d].
    mass: [K] float32, the moving average of how many rows chose each code.
    total: [K, d] float32, the moving average of the sum of those rows.
    codes: [B] int, the choices of this step.
    residuals: [B, d] what was quantized.
    valid: [B] bool, the rows that count.
    decay: of the averages, in [0, 1).
    axis_name: the mapped axis over which the batch is split, or None; the averages are of the global batch.

  Returns:
    (codebook, mass, total). A code that nothing has chosen for long keeps its place: `total` and `mass` shrink alike.
  """
  weights = valid.astype(jnp.float32)
  rows = jnp.where(valid[:, None], residuals.astype(jnp.float32), 0.0)
  count = code_counts(codes, mass.shape[0], weights=weights)
  sums = jnp.zeros_like(total).at[codes].add(rows)
  if axis_name is not None:
    count, sums = jax.lax.psum((count, sums), axis_name)
  mass = decay * mass + (1.0 - decay) * count
  total = decay * total + (1.0 - decay) * sums
  mean = total / jnp.maximum(mass, 1e-12)[:, None]
  return jnp.where(mass[:, None] > 1e-12, mean, codebook).astype(codebook.dtype), mass, total
