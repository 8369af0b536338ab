"""Dot-product attention with an optional additive bias: the one place where similarity meets the backbone."""

from collections.abc import Callable

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
  place = jnp.arange(length, dtype=jnp.int32)
  causal = place[:, None] >= place[None, :]
  same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
  return ((same & causal[None]) | jnp.eye(length, dtype=bool)[None])[:, None]


# Up to so many positions (the codes of an ID) are summed one by one: a product of small matrices for each history and
# head takes a CPU up to ten times as long.
_FEW = 8


@jax.custom_vjp
def _pair_products(query: jax.Array, key: jax.Array) -> jax.Array:
  """Dot product of each query and key: [B, T, H, d], [B, S, H, d] -> [B, H, T, S] float32."""
  return jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _weighted_sums(weights: jax.Array, value: jax.Array) -> jax.Array:
  """Sums of values, one a query: [B, H, T, S], [B, S, H, d] -> [B, T, H, d] of the values' type."""
  if value.shape[1] > _FEW:
    # In this order, and turned at the end: the one that `jnp.einsum` chooses takes a CPU up to twice as long.
    sums = jnp.einsum("bhts,bhsd->bhtd", weights, jnp.swapaxes(value, 1, 2))
    return jnp.swapaxes(sums, 1, 2).astype(value.dtype)
  shares = jnp.transpose(weights.astype(jnp.float32), (0, 2, 3, 1))[..., None]  # [B, T, S, H, 1]
  terms = [shares[:, :, place] * value[:, None, place].astype(jnp.float32) for place in range(value.shape[1])]
  return sum(terms[1:], start=terms[0]).astype(value.dtype)


# Either one's gradients are the other and itself.
_pair_products.defvjp(
  lambda query, key: (_pair_products(query, key), (query, key)),
  lambda kept, gradient: (
    _weighted_sums(gradient, kept[1]).astype(kept[0].dtype),
    _weighted_sums(jnp.swapaxes(gradient, 2, 3), kept[0]).astype(kept[1].dtype),
  ),
)
_weighted_sums.defvjp(
  lambda weights, value: (_weighted_sums(weights, value), (weights, value)),
  lambda kept, gradient: (
    _pair_products(gradient, kept[1]).astype(kept[0].dtype),
    _weighted_sums(jnp.swapaxes(kept[0], 2, 3), gradient).astype(kept[1].dtype),
  ),
)


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  mask: jax.Array,
  bias: jax.Array | None = None,
  drop: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
  """softmax(q k / sqrt(d_head) + bias) v over the positions that `mask` allows.

  A bias of zeros gives, bit for bit, what none gives.

  Args:
    query: [B, T, H, d_head].
    key: [B, T, H, d_head].
    value: [B, T, H, d_head].
    mask: bool, broadcasts to [B, H, T, T].
    bias: float, broadcasts to [B, H, T, T], or None.
    drop: dropout of the attention weights, [B, H, T, T] to the same; None: none.

  Returns:
    [B, T, H, d_head], in the type of `query`; scores and softmax are float32.
  """
  # One query, as in a cached search: many products of a vector and a few rows, for which a sum is the faster form.
  if query.shape[1] == 1:
    products = query.astype(jnp.float32) * key.astype(jnp.float32)
    scores = jnp.swapaxes(jnp.sum(products, axis=-1), 1, 2)[:, :, None]
  else:
    scores = _pair_products(query, key)
  scores = scores * query.shape[-1] ** -0.5
  if bias is not None:
    scores = scores + bias.astype(jnp.float32)
  weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1)
  return _weighted_sums((weights if drop is None else drop(weights)).astype(value.dtype), value)
