"""Sequence backbones. Each takes the similarity bias as one optional argument and is otherwise what it was."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from bbqrec_jax.layers.dense import Dense, DenseGeneral
from bbqrec_jax.layers.dropout import Dropout
from bbqrec_jax.ops.attention import attention, history_mask
from bbqrec_jax.ops.positions import elapsed_buckets, relative_buckets

KeyValue = tuple[jax.Array, jax.Array]


class SelfAttention(nn.Module):
  """Multi-head self-attention with an additive bias on its scores.

  Attributes:
    num_heads: H; must divide the width.
  """

  num_heads: int

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array,
    bias: jax.Array | None = None,
    cache: KeyValue | None = None,
  ) -> tuple[jax.Array, KeyValue]:
    """Attends from each position of `x` to `cache` and to `x` itself.

    Args:
      x: [B, T, d].
      mask: bool, broadcasts to [B, H, T, P + T].
      bias: broadcasts like `mask`, or None.
      cache: keys and values [B, P, H, d / H] of earlier positions, or None.

    Returns:
      [B, T, d], and the keys and values [B, P + T, H, d / H] to pass on as the next call's cache.
    """
    width = x.shape[-1]
    heads = (self.num_heads, width // self.num_heads)
    query, key, value = (DenseGeneral(heads, name=name)(x) for name in ("query", "key", "value"))
    if cache is not None:
      key, value = jnp.concatenate([cache[0], key], axis=1), jnp.concatenate([cache[1], value], axis=1)
    mixed = attention(query, key, value, mask=mask, bias=bias)
    return DenseGeneral(width, axis=(-2, -1), name="out")(mixed), (key, value)


class TransformerLayer(nn.Module):
  """A pre-normalised transformer layer.

  Attributes:
    num_heads: H.
    mlp_width: width of the feed-forward part.
    dropout: rate on each of the two residual branches.
  """

  num_heads: int
  mlp_width: int
  dropout: float = 0.0

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array,
    bias: jax.Array | None = None,
    cache: KeyValue | None = None,
    *,
    deterministic: bool,
  ) -> tuple[jax.Array, KeyValue]:
    """As `SelfAttention`: [B, T, d] -> [B, T, d], and the keys and values."""
    drop = Dropout(self.dropout, deterministic=deterministic)
    attend = SelfAttention(self.num_heads, name="attention")
    mixed, cache = attend(nn.LayerNorm()(x), mask, bias, cache)
    x = x + drop(mixed)
    hidden = nn.gelu(Dense(self.mlp_width)(nn.LayerNorm()(x)))
    return x + drop(Dense(x.shape[-1])(hidden)), cache


class RelativeBias(nn.Module):
  """A learned number a head and bucket of relative positions (T5).

  Attributes:
    num_heads: H.
    num_buckets: of the distances.
    bidirectional: whether keys after the query have buckets of their own.
  """

  num_heads: int
  num_buckets: int
  bidirectional: bool = True

  @nn.compact
  def __call__(self, distance: jax.Array) -> jax.Array:
    """Place of the key less place of the query, [..., T, S] int -> bias [..., H, T, S], with a leading 1 for [T, S]."""
    table = self.param("table", nn.initializers.normal(0.02), (self.num_buckets, self.num_heads), jnp.float32)
    bucket = relative_buckets(distance, num_buckets=self.num_buckets, bidirectional=self.bidirectional)
    bias = jnp.moveaxis(table[bucket], -1, -3)
    return bias[None] if distance.ndim == 2 else bias


class ElapsedBias(nn.Module):
  """A learned number a head and bucket of the time between two interactions; all start at zero.

  Attributes:
    num_heads: H.
    num_buckets: of the times.
  """

  num_heads: int
  num_buckets: int

  @nn.compact
  def __call__(self, times: jax.Array) -> jax.Array:
    """Seconds [B, T] int -> bias [B, H, T, T], query before key."""
    table = self.param("table", nn.initializers.zeros, (self.num_buckets, self.num_heads), jnp.float32)
    bucket = elapsed_buckets(times[:, :, None] - times[:, None, :], num_buckets=self.num_buckets)
    return jnp.moveaxis(table[bucket], -1, 1)


def summed_bias(*parts: jax.Array | None) -> jax.Array | None:
  """The sum of what is added to attention scores, of what is not None; None where nothing is."""
  given = [part for part in parts if part is not None]
  return sum(given[1:], start=given[0]) if given else None


class CausalBackbone(nn.Module):
  """A causal transformer over item vectors: each position's output is the state of the history up to it.

  Several histories may share a row: a position sees only its own segment, and counts its place from that segment's
  start, so a packed history gives what it gives alone.

  Attributes:
    num_layers: transformer layers.
    num_heads: H.
    mlp_width: width of the feed-forward parts.
    max_length: positions that have an embedding; places from `max_length` on share the last.
    dropout: rate on the input and on each residual branch.
    position_buckets: of relative positions, which then take the place of embeddings of the places; 0: embeddings.
    time_buckets: of the time between interactions, a bias like that of relative positions; 0: none.
  """

  num_layers: int
  num_heads: int
  mlp_width: int
  max_length: int
  dropout: float = 0.0
  position_buckets: int = 0
  time_buckets: int = 0

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    bias: jax.Array | None = None,
    times: jax.Array | None = None,
    *,
    deterministic: bool = True,
  ) -> jax.Array:
    """Runs the layers.

    Args:
      x: [B, T, d] item vectors.
      segments: [B, T] int; 0 is padding, equal positive numbers in a row are one history.
      positions: [B, T] int, the place of each item in its history, from 0.
      bias: [B, H, T, T] added to the attention scores of every layer, or None.
      times: [B, T] int, the second of each interaction, counted from anywhere; only read where there are time buckets.
      deterministic: no dropout.

    Returns:
      [B, T, d] normalised states; those at padding mean nothing.
    """
    position, elapsed = None, None
    if self.position_buckets:
      distance = positions[:, None, :] - positions[:, :, None]
      position = RelativeBias(self.num_heads, self.position_buckets, bidirectional=False, name="position")(distance)
    else:
      place = nn.Embed(self.max_length, x.shape[-1], embedding_init=nn.initializers.normal(0.02), name="position")
      x = x + place(jnp.minimum(positions, self.max_length - 1))
    if self.time_buckets and times is not None:
      elapsed = ElapsedBias(self.num_heads, self.time_buckets, name="time")(times)
    x = Dropout(self.dropout, deterministic=deterministic)(x)
    mask, added = history_mask(segments), summed_bias(position, elapsed, bias)
    for index in range(self.num_layers):
      layer = TransformerLayer(self.num_heads, self.mlp_width, self.dropout, name=f"layer_{index}")
      x, _ = layer(x, mask, added, deterministic=deterministic)
    return nn.LayerNorm(name="final_norm")(x)
