"""Stage 2, the semantics-aware sequence model: item vectors, backbone with similarity bias, and a head."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from bbqrec_jax.models.backbones import CausalBackbone
from bbqrec_jax.models.heads import GenerativeHead
from bbqrec_jax.ops.reduction import masked_mean
from bbqrec_jax.ops.similarity import bucket_bias, similarity_buckets, stream_pairs
from bbqrec_jax.semantic_ids.beam import BeamResult, beam_search
from bbqrec_jax.semantic_ids.trie import Trie

HEADS = ("generative", "dense")
ITEM_INPUTS = ("fused", "modalities", "item")


@dataclasses.dataclass(frozen=True)
class RecommenderSettings:
  """Shapes of the recommender.

  Attributes:
    num_items: N.
    num_levels: L.
    num_codes: K.
    num_columns: code columns of the catalogue (see `Catalogue.columns`); 0 where items are known by number alone.
    item_embedding: whether each item also has a vector of its own.
    head: "generative" or "dense".
    width: d of the sequence model.
    num_layers: backbone layers.
    num_heads: H.
    mlp_width: width of the feed-forward parts.
    depth_layers: layers of the generative head's depth transformer.
    dropout: rate everywhere.
    max_length: T, the longest history.
    num_streams: streams whose similarity reweights attention; 0 gives the plain backbone.
    cross_pairs: whether pairs of different streams have tables too.
    num_buckets: similarity buckets.
    softmax_over: what a code of the generative head competes with: the codes that lead on to items ("existing"), or
      "all" K.
  """

  num_items: int
  num_levels: int = 4
  num_codes: int = 256
  num_columns: int = 4
  item_embedding: bool = True
  head: str = "generative"
  width: int = 64
  num_layers: int = 2
  num_heads: int = 2
  mlp_width: int = 256
  depth_layers: int = 1
  dropout: float = 0.3
  max_length: int = 20
  num_streams: int = 2
  cross_pairs: bool = True
  num_buckets: int = 32
  softmax_over: str = "existing"

  @property
  def pairs(self) -> tuple[tuple[int, int], ...]:
    """The stream pairs that have a bias table."""
    return stream_pairs(self.num_streams, cross=self.cross_pairs)


@flax.struct.dataclass
class Catalogue:
  """What the model is told about items; data, not parameters.

  Attributes:
    semantic_ids: [N, L] int32, each item's own ID.
    columns: [N, C] int32: rows of the code embedding whose sum is the item's semantic vector; -1 where a modality is
      absent.
    vectors: [N, S, d_code] float32 quantized vectors whose similarities reweight attention; zero rows where absent.
    edges: [P, n_buckets - 1] float32 bucket edges of each stream pair.
    trie: of the semantic IDs; the generative head decodes over it, and others need none.
  """

  semantic_ids: jax.Array
  columns: jax.Array
  vectors: jax.Array
  edges: jax.Array
  trie: Trie | None = None


def code_columns(codes: list[np.ndarray], present: list[np.ndarray], *, num_codes: int) -> np.ndarray:
  """Numbers every (stream, level, code) on its own: a list of [N, L] codes -> [N, sum of L] rows of one embedding.

  Args:
    codes: one [N, L] array a stream.
    present: one [N] bool array a stream; the columns of an absent one are -1.
    num_codes: K.

  Returns:
    [N, C] int32.
  """
  stacked = np.concatenate(codes, axis=1)
  here = np.concatenate(
    [np.repeat(p[:, None], c.shape[1], axis=1) for c, p in zip(codes, present, strict=True)], axis=1
  )
  return np.where(here, stacked + num_codes * np.arange(stacked.shape[1]), -1).astype(np.int32)


class Recommender(nn.Module):
  """Item vectors -> causal backbone with similarity bias -> head.

  Attributes:
    settings: the shapes.
  """

  settings: RecommenderSettings

  def setup(self):
    """Makes the parameters and submodules."""
    s = self.settings
    if s.item_embedding:
      self.item_embedding = self.param("item_embedding", nn.initializers.normal(0.02), (s.num_items, s.width))
    if s.num_columns:
      self.code_embedding = self.param(
        "code_embedding", nn.initializers.normal(0.02), (s.num_columns * s.num_codes, s.width)
      )
    if s.num_streams:
      # Zero tables: at step 0 the model is the plain backbone, bit for bit.
      self.similarity_tables = self.param(
        "similarity_tables", nn.initializers.zeros, (len(s.pairs), s.num_heads, s.num_buckets + 2)
      )
    self.backbone = CausalBackbone(s.num_layers, s.num_heads, s.mlp_width, s.max_length, s.dropout)
    if s.head == "generative":
      self.head = GenerativeHead(
        s.num_levels, s.num_codes, s.width, s.depth_layers, s.num_heads, s.mlp_width, s.dropout
      )

  def item_vectors(self, catalogue: Catalogue, items: jax.Array | None = None) -> jax.Array:
    """Sum of an item's code embeddings and of its own: items [...] -> [..., d]; None means all N in order."""
    s = self.settings
    total: jax.Array | float = 0.0
    if s.item_embedding:
      total = self.item_embedding if items is None else self.item_embedding[items]
    if s.num_columns:
      columns = catalogue.columns if items is None else catalogue.columns[items]
      for column in range(s.num_columns):
        row = columns[..., column]
        total = total + jnp.where((row >= 0)[..., None], self.code_embedding[jnp.maximum(row, 0)], 0.0)
    return jnp.asarray(total)

  def bias(self, catalogue: Catalogue, items: jax.Array, segments: jax.Array) -> jax.Array | None:
    """The attention bias [B, H, T, T] of histories `items` [B, T], or None where similarity is switched off."""
    s = self.settings
    if not s.num_streams:
      return None
    buckets = similarity_buckets(catalogue.vectors[items], segments > 0, catalogue.edges, pairs=s.pairs)
    return bucket_bias(self.similarity_tables, buckets)

  def states(
    self,
    catalogue: Catalogue,
    items: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    *,
    deterministic: bool = True,
  ) -> jax.Array:
    """The state at each position of each history: items, segments, positions [B, T] int -> [B, T, d]."""
    x = self.item_vectors(catalogue, items)
    bias = self.bias(catalogue, items, segments)
    return self.backbone(x, segments, positions, bias, deterministic=deterministic)

  def dense_scores(self, catalogue: Catalogue, states: jax.Array) -> jax.Array:
    """Score of every item: states [P, d] -> [P, N] float32."""
    return jnp.dot(states, self.item_vectors(catalogue).T, preferred_element_type=jnp.float32)

  def loss(
    self, catalogue: Catalogue, batch: dict[str, jax.Array], *, deterministic: bool, axis_name: str | None = None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of the next item at every position that has one.

    Args:
      catalogue: the items.
      batch: `items`, `targets`, `segments`, `positions`, each [B, T] int; histories are packed, so nearly every
        position is real, and padding (segment 0) is masked out.
      deterministic: no dropout.
      axis_name: the mapped axis over which the batch is split, or None.

    Returns:
      (loss, terms): this device's share of the mean over real positions. For the generative head the loss is the sum
      over levels, the negative log-likelihood of the whole ID, and `terms` has each level's part and accuracy.
    """
    states = self.states(catalogue, batch["items"], batch["segments"], batch["positions"], deterministic=deterministic)
    states = states.reshape(-1, states.shape[-1])
    targets, real = batch["targets"].reshape(-1), batch["segments"].reshape(-1) > 0
    if self.settings.head == "dense":
      scores = self.dense_scores(catalogue, states)
      own = jnp.take_along_axis(scores, targets[:, None], axis=1)[:, 0]
      loss = masked_mean(jax.nn.logsumexp(scores, axis=1) - own, real, axis_name=axis_name)
      return loss, {"nll": loss}
    surprise = -self.level_log_probs(catalogue, states, targets, deterministic=deterministic)
    levels = [masked_mean(surprise[:, level], real, axis_name=axis_name) for level in range(self.settings.num_levels)]
    loss = sum(levels[1:], start=levels[0])
    return loss, {"nll": loss} | {f"nll_level_{level + 1}": value for level, value in enumerate(levels)}

  def last_states(self, catalogue: Catalogue, batch: dict[str, jax.Array]) -> jax.Array:
    """The state after the whole history, one history a row: `items`, `segments`, `positions` [B, T] -> [B, d]."""
    states = self.states(catalogue, batch["items"], batch["segments"], batch["positions"])
    last = jnp.maximum(jnp.sum(batch["segments"] > 0, axis=1) - 1, 0)
    return jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]

  def level_log_probs(
    self, catalogue: Catalogue, states: jax.Array, items: jax.Array, *, deterministic: bool = True
  ) -> jax.Array:
    """Log-probability of each code of given items' IDs, by teacher forcing: states [P, d], items [P] -> [P, L] float32.

    With `softmax_over` "existing", the softmax runs over the children of the trie's node alone: the probabilities of
    all items then sum to one, and nothing is spent on learning which IDs exist, which the search knows anyway (this
    project's choice).
    """
    codes = catalogue.semantic_ids[items]
    logits = self.head(states, codes, deterministic=deterministic)
    own = jnp.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]
    if self.settings.softmax_over == "all":
      return own - jax.nn.logsumexp(logits, axis=-1)
    assert catalogue.trie is not None
    totals = []
    for level in range(self.settings.num_levels):
      _, among, valid = catalogue.trie.children(level, catalogue.trie.parents[items, level])
      children = jnp.take_along_axis(logits[:, level], among, axis=-1)
      totals.append(jax.nn.logsumexp(jnp.where(valid, children, -jnp.inf), axis=-1))
    return own - jnp.stack(totals, axis=1)

  def generate(
    self, catalogue: Catalogue, states: jax.Array, *, width: int, exclude: jax.Array | None = None
  ) -> BeamResult:
    """The `width` most probable items by constrained beam search: states [B, d] -> `BeamResult`."""
    assert catalogue.trie is not None
    return beam_search(
      catalogue.trie,
      self.head.step,
      self.head.start(states),
      batch=states.shape[0],
      width=width,
      normalize=self.settings.softmax_over == "existing",
      exclude=exclude,
    )

  def log_probs(self, catalogue: Catalogue, states: jax.Array, items: jax.Array) -> jax.Array:
    """Log-probability of given items' IDs: states [B, d], items [B, n] -> [B, n] float32."""
    batch, count = items.shape
    levels = self.level_log_probs(catalogue, jnp.repeat(states, count, axis=0), items.reshape(-1))
    return levels.sum(axis=-1).reshape(batch, count)

  def __call__(self, catalogue: Catalogue, batch: dict[str, Any]) -> jax.Array:
    """The loss, without dropout; touches every parameter, for `init`."""
    return self.loss(catalogue, batch, deterministic=True)[0]
