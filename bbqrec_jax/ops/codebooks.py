"""Code counts, perplexity, and revival of unused codes."""

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
