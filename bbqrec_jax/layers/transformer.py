"""Transformers over sequences, with the similarity bias as one optional argument; without it they are plain ones."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from bbqrec_jax.layers.dense import Dense, DenseGeneral
from bbqrec_jax.layers.dropout import Dropout
from bbqrec_jax.ops.attention import attention, history_mask
from bbqrec_jax.ops.positions import elapsed_buckets, last_places, relative_buckets

KeyValue = tuple[jax.Array, jax.Array]
Initializer = nn.initializers.Initializer
LECUN = nn.initializers.lecun_normal()  # Flax's own choice.


class SelfAttention(nn.Module):
  """Multi-head self-attention with an additive bias on its scores.

  Attributes:
    num_heads: H; must divide the width.
    dropout: rate on the attention weights.
    kernel_init: of all matrices.
  """

  num_heads: int
  dropout: float = 0.0
  kernel_init: Initializer = LECUN

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array,
    bias: jax.Array | None = None,
    cache: KeyValue | None = None,
    queries: jax.Array | None = None,
    *,
    deterministic: bool = True,
  ) -> tuple[jax.Array, KeyValue]:
    """Attends from each position of `x`, or from `queries`, to `cache` and to `x`.

    Args:
      x: [B, T, d].
      mask: bool, broadcasts to [B, H, Q, P + T].
      bias: broadcasts like `mask`, or None.
      queries: [B, Q, d]; None: x.
      cache: keys and values [B, P, H, d / H] of earlier positions, or None.
      deterministic: no dropout.

    Returns:
      [B, Q, d], and the keys and values [B, P + T, H, d / H] to pass on as the next call's cache.
    """
    width = x.shape[-1]
    heads = (self.num_heads, width // self.num_heads)
    dense = functools.partial(DenseGeneral, kernel_init=self.kernel_init)
    query = dense(heads, name="query")(x if queries is None else queries)
    key, value = (dense(heads, name=name)(x) for name in ("key", "value"))
    if cache is not None:
      key, value = jnp.concatenate([cache[0], key], axis=1), jnp.concatenate([cache[1], value], axis=1)
    drop = None if deterministic or not self.dropout else Dropout(self.dropout, deterministic=False)
    mixed = attention(query, key, value, mask=mask, bias=bias, drop=drop)
    return dense(width, axis=(-2, -1), name="out")(mixed), (key, value)


class TransformerLayer(nn.Module):
  """A transformer layer.

  Attributes:
    num_heads: H.
    mlp_width: width of the feed-forward part.
    dropout: rate on each of the two residual branches.
    attention_dropout: rate on the attention weights.
    post_norm: normalise each sum of the residual stream and a branch, in place of what goes into the branch; the
      matrices then start small (normal, 0.02), as BERT's do, so that at first a layer hardly changes its input.
  """

  num_heads: int
  mlp_width: int
  dropout: float = 0.0
  attention_dropout: float = 0.0
  post_norm: bool = False

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array,
    bias: jax.Array | None = None,
    cache: KeyValue | None = None,
    at: jax.Array | None = None,
    *,
    deterministic: bool,
  ) -> tuple[jax.Array, KeyValue]:
    """As `SelfAttention`: [B, T, d] -> [B, T, d], and the keys and values.

    With `at`, [B] int, only the output at one place of each row is made, [B, 1, d]: a last layer need not make more.
    """
    drop = Dropout(self.dropout, deterministic=deterministic)
    before, after = nn.LayerNorm(name="LayerNorm_0"), nn.LayerNorm(name="LayerNorm_1")
    init = nn.initializers.normal(0.02) if self.post_norm else LECUN
    attend = SelfAttention(self.num_heads, self.attention_dropout, init, name="attention")
    normed, queries = x if self.post_norm else before(x), None
    if at is not None:
      x, queries = _at(x, at, axis=1), _at(normed, at, axis=1)
      mask, bias = _at(mask, at, axis=2), None if bias is None else _at(bias, at, axis=2)
    mixed, cache = attend(normed, mask, bias, cache, queries, deterministic=deterministic)
    x = x + drop(mixed)
    if self.post_norm:
      x = before(x)
    hidden = nn.gelu(Dense(self.mlp_width, kernel_init=init)(x if self.post_norm else after(x)))
    x = x + drop(Dense(x.shape[-1], kernel_init=init)(hidden))
    return after(x) if self.post_norm else x, cache


def _at(x: jax.Array, places: jax.Array, *, axis: int) -> jax.Array:
  """One place [B] of each row's axis, which stays with length 1; a row of one is all rows'."""
  x = jnp.broadcast_to(x, (places.shape[0], *x.shape[1:]))
  index = places.reshape(-1, *(1 for _ in x.shape[1:]))
  return jnp.take_along_axis(x, index, axis=axis)


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
    max_length: places that have an embedding; those from `max_length` on share the last.
    dropout: rate on the input and on each residual branch.
    relative_buckets: of the distance between items, of which each head has a bias; places then have no embedding. 0:
      they have one.
    time_buckets: of the time between interactions, a bias like that of distances; 0: none.
    attention_dropout: rate on the attention weights.
    post_norm: see `TransformerLayer`; the input is normalised too, and the output no more.
    whole_rows: each row is one history; places are counted from its last item, and the state there is all that is
      made.
  """

  num_layers: int
  num_heads: int
  mlp_width: int
  max_length: int
  dropout: float = 0.0
  relative_buckets: int = 0
  time_buckets: int = 0
  attention_dropout: float = 0.0
  post_norm: bool = False
  whole_rows: bool = False

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    bias: jax.Array | None = None,
    times: jax.Array | None = None,
    *,
    last_alone: bool = False,
    deterministic: bool = True,
  ) -> jax.Array:
    """Runs the layers.

    Args:
      x: [B, T, d] item vectors.
      segments: [B, T] int; 0 is padding, equal positive numbers in a row are one history.
      positions: [B, T] int, the place of each item in its history, from 0; items of a history stand side by side.
      bias: [B, H, T, T] added to the attention scores of every layer, or None.
      times: [B, T] int, the second of each interaction, counted from anywhere; only read where there are time buckets.
      last_alone: each row is one history, and only the state at its last item is made, as with `whole_rows`.
      deterministic: no dropout.

    Returns:
      [B, T, d] normalised states, those at padding mean nothing; or [B, d], the last.
    """
    last, last_alone = last_places(segments), last_alone or self.whole_rows
    relative = elapsed = None
    if self.relative_buckets:
      place = jnp.arange(x.shape[1], dtype=jnp.int32)
      relative = RelativeBias(self.num_heads, self.relative_buckets, bidirectional=False, name="relative")(
        place[None, :] - place[:, None]
      )
    else:
      places = jnp.maximum(last[:, None] - positions, 0) if self.whole_rows else positions
      embed = nn.Embed(self.max_length, x.shape[-1], embedding_init=nn.initializers.normal(0.02), name="position")
      x = x + embed(jnp.minimum(places, self.max_length - 1))
    if self.time_buckets and times is not None:
      elapsed = ElapsedBias(self.num_heads, self.time_buckets, name="time")(times)
    if self.post_norm:
      x = nn.LayerNorm(name="input_norm")(x)
    x = Dropout(self.dropout, deterministic=deterministic)(x)
    mask, added = history_mask(segments), summed_bias(relative, elapsed, bias)
    for index in range(self.num_layers):
      layer = TransformerLayer(
        self.num_heads, self.mlp_width, self.dropout, self.attention_dropout, self.post_norm,
        name=f"layer_{index}",
      )  # fmt: skip
      at = last if last_alone and index == self.num_layers - 1 else None
      x, _ = layer(x, mask, added, at=at, deterministic=deterministic)
    x = x if self.post_norm else nn.LayerNorm(name="final_norm")(x)
    return x[:, 0] if last_alone else x
