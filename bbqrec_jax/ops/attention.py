"""Dot-product attention with an optional additive bias: the one place where similarity meets the backbone."""

import jax
import jax.numpy as jnp


def history_mask(segments: jax.Array) -> jax.Array:
  """Which positions each position may attend to: its own history, itself and before.

  Args:
    segments: [B, T] int; 0 is padding, equal positive numbers in a row are one user's history.

  Returns:
    [B, 1, T, T] bool, query before key. A padding position sees only itself, so its softmax is finite.
  """
  length = segments.shape[1]
  causal = jnp.arange(length)[:, None] >= jnp.arange(length)[None, :]
  same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
  return ((same & causal[None]) | jnp.eye(length, dtype=bool)[None])[:, None]


def attention(
  query: jax.Array, key: jax.Array, value: jax.Array, *, mask: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
  """softmax(q k / sqrt(d_head) + bias) v over the positions that `mask` allows.

  A bias of zeros gives, bit for bit, what no bias gives.

  Args:
    query: [B, T, H, d_head].
    key: [B, T, H, d_head].
    value: [B, T, H, d_head].
    mask: bool, broadcasts to [B, H, T, T].
    bias: float, broadcasts to [B, H, T, T], or None.

  Returns:
    [B, T, H, d_head], in the type of `query`; scores and softmax are float32.
  """
  scores = jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32)
  scores = scores * (query.shape[-1] ** -0.5)
  if bias is not None:
    scores = scores + bias.astype(jnp.float32)
  weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1)
  return jnp.einsum("bhts,bshd->bthd", weights.astype(value.dtype), value)
