"""A T5-style encoder and decoder over flattened code tokens: TIGER's, LETTER's and MQL4GRec's kind of sequence model.

Pre-normalised with RMSNorm, no biases in any product, bucketed relative positions in place of absolute ones. The
similarity bias of the items is one optional argument of the encoder and is expanded over each item's tokens.
"""

import functools
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from bbqrec_jax.layers.dense import Dense, DenseGeneral
from bbqrec_jax.layers.dropout import Dropout
from bbqrec_jax.layers.transformer import KeyValue, RelativeBias, summed_bias
from bbqrec_jax.ops.attention import attention
from bbqrec_jax.ops.products import repeat_rows
from bbqrec_jax.recommender.catalogue import RecommenderSettings
from bbqrec_jax.recommender.subtree_logits import Addition, SubtreeLogits, additions, search_logits, training_logits
from bbqrec_jax.semantic_ids.beam import BeamResult, beam_search, item_log_probs


@flax.struct.dataclass
class Memory:
  """What the encoder makes of histories.

  Attributes:
    tokens: [B, S, d].
    real: [B, S] bool, False at padding.
  """

  tokens: jax.Array
  real: jax.Array

  def pooled(self) -> jax.Array:
    """Mean of the real tokens, [B, d]."""
    weight = self.real[..., None].astype(self.tokens.dtype)
    return jnp.sum(self.tokens * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1.0)


class Shape(NamedTuple):
  """Widths of a stack of layers.

  Attributes:
    width: d.
    num_heads: H.
    head_width: of each head; H times it need not be d.
    mlp_width: of the feed-forward parts.
    dropout: rate on the input, each residual branch and the output.
    implementation: of the attention, see `ops.attention`.
  """

  width: int
  num_heads: int
  head_width: int
  mlp_width: int
  dropout: float = 0.0
  implementation: str = "einsum"


class Attention(nn.Module):
  """Attention whose keys and values may be made ahead."""

  shape: Shape

  def setup(self):
    """Makes the products."""
    heads = (self.shape.num_heads, self.shape.head_width)
    self.query, self.key, self.value = (DenseGeneral(heads, use_bias=False) for _ in range(3))
    self.out = DenseGeneral(self.shape.width, axis=(-2, -1), use_bias=False)

  def keys_values(self, x: jax.Array) -> KeyValue:
    """Keys and values of [B, S, d], each [B, S, H, d_head]."""
    return self.key(x), self.value(x)

  def __call__(self, x: jax.Array, keys_values: KeyValue, mask: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """[B, T, d] attends to S places; mask and bias, which is added to the scores, broadcast to [B, H, T, S]."""
    query, (key, value) = self.query(x), keys_values
    mixed = attention(query, key, value, mask=mask, bias=bias, implementation=self.shape.implementation)
    return self.out(mixed)


class Layer(nn.Module):
  """One layer of the encoder, or with `cross` of the decoder."""

  shape: Shape
  cross: bool = False

  def setup(self):
    """Makes the parts."""
    self.self_norm, self.mlp_norm = nn.RMSNorm(), nn.RMSNorm()
    self.self_attention = Attention(self.shape)
    if self.cross:
      self.cross_norm, self.cross_attention = nn.RMSNorm(), Attention(self.shape)
    self.mlp_in = Dense(self.shape.mlp_width, use_bias=False)
    self.mlp_out = Dense(self.shape.width, use_bias=False)
    self.drop = Dropout(self.shape.dropout)

  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array,
    bias: jax.Array | None,
    *,
    cache: KeyValue | None = None,
    memory: tuple[KeyValue, jax.Array] | None = None,
    deterministic: bool,
  ) -> tuple[jax.Array, KeyValue]:
    """[B, T, d] -> [B, T, d], and the keys and values [B, P + T, H, d_head] of earlier and own places.

    Args:
      x: [B, T, d].
      mask: broadcasts to [B, H, T, P + T].
      bias: likewise, or None; of relative positions and of similarity.
      cache: keys and values of P earlier places.
      memory: the cross-attention's keys and values, and its mask, broadcast to [B, H, T, S].
      deterministic: no dropout.
    """
    normed = self.self_norm(x)
    keys_values = self.self_attention.keys_values(normed)
    if cache is not None:
      keys_values = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), cache, keys_values)
    x = x + self.drop(self.self_attention(normed, keys_values, mask, bias), deterministic=deterministic)
    if memory is not None:
      x = x + self.drop(self.cross_attention(self.cross_norm(x), *memory), deterministic=deterministic)
    hidden = self.drop(nn.relu(self.mlp_in(self.mlp_norm(x))), deterministic=deterministic)
    return x + self.drop(self.mlp_out(hidden), deterministic=deterministic), keys_values


class Encoder(nn.Module):
  """Encodes histories of items, each a run of code tokens.

  Attributes:
    shape: widths.
    num_layers: layers.
    num_buckets: of relative positions.
  """

  shape: Shape
  num_layers: int
  num_buckets: int = 32

  @nn.compact
  def __call__(
    self, tokens: jax.Array, real: jax.Array, bias: jax.Array | None = None, *, deterministic: bool = True
  ) -> Memory:
    """Runs the layers.

    Args:
      tokens: [B, T, L, d], of each item's codes.
      real: [B, T] bool, False at padding.
      bias: [B, H, T, T] between items, the same in every layer, or None.
      deterministic: no dropout.

    Returns:
      A `Memory` of S = T L tokens; those at padding mean nothing.
    """
    batch, length, levels, width = tokens.shape
    x = tokens.reshape(batch, length * levels, width)
    here = jnp.repeat(real, levels, axis=1)
    places = jnp.arange(length * levels, dtype=jnp.int32)
    # A token of padding sees itself, so that its softmax is finite.
    mask = here[:, None, None, :] | jnp.eye(length * levels, dtype=bool)[None, None]
    position = RelativeBias(self.shape.num_heads, self.num_buckets, name="position")(places[None, :] - places[:, None])
    position = repeat_rows(position[0], batch)
    drop = Dropout(self.shape.dropout, deterministic=deterministic)
    x = drop(x)
    if bias is not None:
      bias = jnp.repeat(jnp.repeat(bias, levels, axis=2), levels, axis=3)
    added = summed_bias(position, bias)
    for index in range(self.num_layers):
      x, _ = Layer(self.shape, name=f"layer_{index}")(x, mask, added, deterministic=deterministic)
    return Memory(drop(nn.RMSNorm(name="final_norm")(x)), here)


class DecoderHead(nn.Module):
  """Predicts the L codes of the next item one after another from the encoder's memory; the head of T5's kind.

  Attributes:
    settings: of the recommender.
  """

  settings: RecommenderSettings
  exact: ClassVar[bool] = False
  reads_memory: ClassVar[bool] = True
  reads_history: ClassVar[bool] = True

  def setup(self):
    """Makes the parameters and submodules."""
    s = self.settings
    shape = encoder_shape(s)
    self.code_embedding = self.param(
      "code_embedding", nn.initializers.normal(1.0), (s.num_levels, s.num_codes, s.width), jnp.float32
    )
    self.start_embedding = self.param("start_embedding", nn.initializers.normal(1.0), (s.width,), jnp.float32)
    self.position = RelativeBias(s.num_heads, s.position_buckets, bidirectional=False)
    self.layers = [Layer(shape, cross=True, name=f"layer_{index}") for index in range(s.num_layers)]
    self.norm = nn.RMSNorm()
    self.drop = Dropout(s.dropout)
    if s.subtree_logits:
      self.subtree_logits = SubtreeLogits(s.num_items)
    if s.seen_item_bias:
      self.offsets = self.param("seen_item_bias", nn.initializers.zeros, (s.num_levels,), jnp.float32)

  def _additions(self, items: Any) -> Addition | None:
    """What is added to the scores of the trie's nodes; None where nothing."""
    tables = self.subtree_logits(items) if self.settings.subtree_logits else None
    return additions(items, tables, self.offsets if self.settings.seen_item_bias else None)

  def _logits(self, x: jax.Array, level: int) -> jax.Array:
    """Of one level, tied to the embeddings of its codes: [..., d] -> [..., K] float32."""
    scaled = x * self.settings.width**-0.5
    return jnp.dot(scaled, self.code_embedding[level].T, preferred_element_type=jnp.float32)

  def _memories(self, memory: Memory) -> list[tuple[KeyValue, jax.Array]]:
    """Each layer's keys and values of the memory, made once, and their mask [B, 1, 1, S]."""
    mask = memory.real[:, None, None, :]
    return [(layer.cross_attention.keys_values(memory.tokens), mask) for layer in self.layers]

  def __call__(
    self, memory: Memory, codes: jax.Array, *, deterministic: bool = True
  ) -> tuple[list[jax.Array], jax.Array]:
    """Logits of every level given the true codes before it, and the states they are of.

    codes [B, L] -> L times [B, K] float32, [B, L, d].
    """
    levels = self.settings.num_levels
    start = jnp.broadcast_to(self.start_embedding, (codes.shape[0], self.settings.width))
    before = [start] + [self.code_embedding[level][codes[:, level]] for level in range(levels - 1)]
    x = self.drop(jnp.stack(before, axis=1), deterministic=deterministic)
    places = jnp.arange(levels, dtype=jnp.int32)
    distance = places[None, :] - places[:, None]
    mask, bias = (distance <= 0)[None, None], self.position(distance)
    for layer, keys_values in zip(self.layers, self._memories(memory), strict=True):
      x, _ = layer(x, mask, bias, memory=keys_values, deterministic=deterministic)
    x = self.drop(self.norm(x), deterministic=deterministic)
    return [self._logits(x[:, level], level) for level in range(levels)], x

  def losses(self, items: Any, memory: Memory, targets: jax.Array, *, deterministic: bool) -> dict[str, jax.Array]:
    """The negative log-likelihood of each code of the targets' IDs, `nll_level_1` [B] and on."""
    codes = items.catalogue.semantic_ids[targets]
    logits, hidden = self(memory, codes, deterministic=deterministic)
    add = training_logits(self._additions(items), hidden)
    log_probs = items.catalogue.code_log_probs(
      logits, targets, softmax_over=self.settings.softmax_over, subtree_logits=add
    )
    return {f"nll_level_{level + 1}": -log_probs[:, level] for level in range(self.settings.num_levels)}

  def step(
    self, memories: list[tuple[KeyValue, jax.Array]], state: Any, level: int, codes: jax.Array | None
  ) -> tuple[jax.Array, Any]:
    """Log-probabilities of one level's codes for every beam; earlier levels are cached.

    Args:
      memories: see `_memories`; of the histories, not of the beams: all beams of a history attend to one memory.
      state: `caches`, for each layer keys and values [B, w, P, H, d_head] of the levels before, and `hidden` [B, w, d];
        None at level 0.
      level: the level to predict, from 0.
      codes: [B, w] chosen at the level before; None at level 0.

    Returns:
      ([B, w, K] float32 log-probabilities, the state for the next level).
    """
    batch = memories[0][1].shape[0]
    if codes is None:
      x = jnp.broadcast_to(self.start_embedding, (batch, 1, self.settings.width))
    else:
      x = self.code_embedding[level - 1][codes]
    beams = x.shape[1]
    bias = self.position(jnp.arange(level + 1, dtype=jnp.int32)[None, :] - level)
    mask = jnp.ones((1, 1, 1, level + 1), bool)

    def fold(leaf):
      return leaf.reshape(batch * beams, *leaf.shape[2:])

    caches = []
    for index, (layer, keys_values) in enumerate(zip(self.layers, memories, strict=True)):
      # Self-attention is of each beam alone, [B w, 1, d]; cross-attention takes a history's beams as its queries.
      normed = fold(layer.self_norm(x))[:, None]
      cache = layer.self_attention.keys_values(normed)
      if state is not None:
        earlier = jax.tree.map(fold, state["caches"][index])
        cache = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), earlier, cache)
      x = x + layer.self_attention(normed, cache, mask, bias).reshape(batch, beams, -1)
      x = x + layer.cross_attention(layer.cross_norm(x), *keys_values)
      x = x + layer.mlp_out(nn.relu(layer.mlp_in(layer.mlp_norm(x))))
      caches.append(jax.tree.map(lambda leaf: leaf.reshape(batch, beams, *leaf.shape[1:]), cache))
    x = self.norm(x)
    return jax.nn.log_softmax(self._logits(x, level)), {"caches": caches, "hidden": x}

  def _walk(self, items: Any, memory: Memory) -> dict[str, Any]:
    """What `beam_search` and `item_log_probs` take; the histories are encoded once."""
    memories = self._memories(memory)
    return {
      "trie": items.catalogue.trie,
      "step": functools.partial(self.step, memories),
      "state": None,
      "normalize": self.settings.softmax_over == "existing",
      "subtree_logits": search_logits(self._additions(items)),
    }

  def search(self, items: Any, memory: Memory, *, width: int, exclude: jax.Array | None = None) -> BeamResult:
    """The `width` most probable items by beam search over the trie."""
    return beam_search(**self._walk(items, memory), batch=memory.real.shape[0], width=width, exclude=exclude)

  def log_probs(self, items: Any, memory: Memory, some: jax.Array) -> jax.Array:
    """Log-probabilities of the IDs of `some` items, [B, n] int -> [B, n] float32; as `losses` counts them."""
    return item_log_probs(**self._walk(items, memory), items=some)


def encoder_shape(s: RecommenderSettings) -> Shape:
  """The widths that the settings give."""
  return Shape(s.width, s.num_heads, s.head_width, s.mlp_width, s.dropout, s.attention)
