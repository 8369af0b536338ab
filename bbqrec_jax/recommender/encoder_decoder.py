"""A T5-style encoder and decoder over flattened code tokens: TIGER's, LETTER's and MQL4GRec's kind of sequence model.

Pre-normalised with RMSNorm, no biases in any product, bucketed relative positions in place of absolute ones. The
similarity bias of the items is one optional argument of the encoder and is expanded over each item's tokens.
"""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from bbqrec_jax.errors import InputError
from bbqrec_jax.layers.dense import Dense, DenseGeneral
from bbqrec_jax.layers.dropout import Dropout
from bbqrec_jax.layers.transformer import KeyValue, RelativeBias, summed_bias
from bbqrec_jax.ops.attention import attention
from bbqrec_jax.ops.products import repeat_rows
from bbqrec_jax.recommender.parts import Backbone, Head, Items, Memory
from bbqrec_jax.recommender.settings import RecommenderSettings
from bbqrec_jax.recommender.subtree_logits import Addition, SubtreeLogits, additions, search_logits, training_logits
from bbqrec_jax.semantic_ids.beam import BeamResult, beam_search, item_log_probs


class Attention(nn.Module):
  """Attention whose keys and values may be made ahead."""

  settings: RecommenderSettings

  def setup(self):
    """Makes the products."""
    heads = (self.settings.num_heads, self.settings.head_width)
    self.query, self.key, self.value = (DenseGeneral(heads, use_bias=False) for _ in range(3))
    self.out = DenseGeneral(self.settings.width, axis=(-2, -1), use_bias=False)

  def keys_values(self, x: jax.Array) -> KeyValue:
    """Keys and values of [B, S, d], each [B, S, H, d_head]."""
    return self.key(x), self.value(x)

  def __call__(self, x: jax.Array, keys_values: KeyValue, mask: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """[B, T, d] attends to S places; mask and bias, which is added to the scores, broadcast to [B, H, T, S]."""
    query, (key, value) = self.query(x), keys_values
    mixed = attention(query, key, value, mask=mask, bias=bias)
    return self.out(mixed)


class Layer(nn.Module):
  """One layer of the encoder, or with `cross` of the decoder."""

  settings: RecommenderSettings
  cross: bool = False

  def setup(self):
    """Makes the parts."""
    self.self_norm, self.mlp_norm = nn.RMSNorm(), nn.RMSNorm()
    self.self_attention = Attention(self.settings)
    if self.cross:
      self.cross_norm, self.cross_attention = nn.RMSNorm(), Attention(self.settings)
    self.mlp_in = Dense(self.settings.mlp_width, use_bias=False)
    self.mlp_out = Dense(self.settings.width, use_bias=False)
    self.drop = Dropout(self.settings.dropout)

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


class Encoder(Backbone):
  """Encodes histories of items, each a run of code tokens."""

  rows: ClassVar[str] = "history"
  reads_codes: ClassVar[bool] = True
  makes_memory: ClassVar[bool] = True

  @classmethod
  def check(cls, settings: RecommenderSettings, prefix: str) -> None:
    """See `Backbone`."""
    places = settings.position_buckets
    if not (4 <= places <= 254 and places % 2 == 0):
      raise InputError(f"config field {prefix}position_buckets must be an even number from 4 to 254, got {places}")
    if settings.time_buckets:
      raise InputError(f"config field {prefix}time_buckets works with the causal backbone: set it to 0")

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
  ) -> Memory:
    """Runs the layers.

    Args:
      x: [B, T, L, d], tokens of each item's codes.
      segments: [B, T] int, 0 at padding.
      positions: not read: those of the tokens follow from their order.
      bias: [B, H, T, T] between items, the same in every layer, or None.
      times: not read.
      deterministic: no dropout.

    Returns:
      A `Memory` of S = T L tokens; those at padding mean nothing.
    """
    del positions, times
    s = self.settings
    batch, length, levels, width = x.shape
    x = x.reshape(batch, length * levels, width)
    here = jnp.repeat(segments > 0, levels, axis=1)
    places = jnp.arange(length * levels, dtype=jnp.int32)
    # A token of padding sees itself, so that its softmax is finite.
    mask = here[:, None, None, :] | jnp.eye(length * levels, dtype=bool)[None, None]
    position = RelativeBias(s.num_heads, s.position_buckets, name="position")(places[None, :] - places[:, None])
    position = repeat_rows(position[0], batch)
    drop = Dropout(s.dropout, deterministic=deterministic)
    x = drop(x)
    for index in range(s.num_layers):
      # Expanded anew in each layer: summed before it is folded, its gradient would be rounded otherwise.
      own = None if bias is None else jnp.repeat(jnp.repeat(bias, levels, axis=2), levels, axis=3)
      added = summed_bias(position, own)
      x, _ = Layer(s, name=f"layer_{index}")(x, mask, added, deterministic=deterministic)
    return Memory(drop(nn.RMSNorm(name="final_norm")(x)), here)


class DecoderHead(Head):
  """Predicts the L codes of the next item one after another from the encoder's memory; the head of T5's kind."""

  exact: ClassVar[bool] = False
  reads_history: ClassVar[bool] = True
  reads_codes: ClassVar[bool] = True
  reads_memory: ClassVar[bool] = True

  def setup(self):
    """Makes the parameters and submodules."""
    s = self.settings
    self.code_embedding = self.param(
      "code_embedding", nn.initializers.normal(1.0), (s.num_levels, s.num_codes, s.width), jnp.float32
    )
    self.start_embedding = self.param("start_embedding", nn.initializers.normal(1.0), (s.width,), jnp.float32)
    self.position = RelativeBias(s.num_heads, s.position_buckets, bidirectional=False)
    self.layers = [Layer(s, cross=True, name=f"layer_{index}") for index in range(s.num_layers)]
    self.norm = nn.RMSNorm()
    self.drop = Dropout(s.dropout)
    if s.subtree_logits:
      self.subtree_logits = SubtreeLogits(s.num_items)
    if s.seen_item_bias:
      self.seen_item_bias = self.param("seen_item_bias", nn.initializers.zeros, (s.num_levels,), jnp.float32)

  def _additions(self, items: Items) -> Addition | None:
    """What is added to the scores of the trie's nodes; None where nothing."""
    tables = self.subtree_logits(items) if self.settings.subtree_logits else None
    return additions(items, tables, self.seen_item_bias if self.settings.seen_item_bias else None)

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

  def losses(self, items: Items, memory: Memory, targets: jax.Array, *, deterministic: bool) -> dict[str, jax.Array]:
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

  def _walk(self, items: Items, memory: Memory) -> dict[str, Any]:
    """What `beam_search` and `item_log_probs` take; the histories are encoded once."""
    memories = self._memories(memory)
    return {
      "trie": items.catalogue.trie,
      "step": functools.partial(self.step, memories),
      "state": None,
      "normalize": self.settings.softmax_over == "existing",
      "subtree_logits": search_logits(self._additions(items)),
    }

  def search(self, items: Items, memory: Memory, *, width: int, exclude: jax.Array | None = None) -> BeamResult:
    """The `width` most probable items by beam search over the trie."""
    return beam_search(**self._walk(items, memory), batch=memory.real.shape[0], width=width, exclude=exclude)

  def log_probs(self, items: Items, memory: Memory, some: jax.Array) -> jax.Array:
    """Log-probabilities of the IDs of `some` items, [B, n] int -> [B, n] float32; as `losses` counts them."""
    return item_log_probs(**self._walk(items, memory), items=some)
