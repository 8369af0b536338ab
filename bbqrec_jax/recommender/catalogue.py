"""What the recommender is told: its shapes, and the items of the catalogue."""

import dataclasses
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from bbqrec_jax.ops.similarity import stream_pairs
from bbqrec_jax.semantic_ids.trie import Trie


@dataclasses.dataclass(frozen=True)
class RecommenderSettings:
  """Shapes of the recommender.

  Attributes:
    num_items: N.
    num_levels: L.
    num_codes: K.
    num_columns: code columns of the catalogue (see `Catalogue.columns`); 0 where items are known by number alone.
    item_embedding: whether each item also has a vector of its own.
    feature_width: F, of the features that an item's vector also has a linear map of; 0: none.
    backbone: "causal", "encoder_decoder", or "module:function" for one of your own.
    head: a name of `models.heads.HEADS`, or "module:function" for one of your own.
    width: d of the sequence model.
    num_layers: backbone layers.
    num_heads: H.
    head_width: of each attention head of the encoder-decoder; the causal backbone's is d / H.
    positions: of the causal backbone: "learned" embeddings of the places, or "relative"; the encoder-decoder's are
      relative.
    position_buckets: of relative positions.
    time_buckets: of the time between interactions, in the causal backbone; 0: none.
    mlp_width: width of the feed-forward parts.
    depth_layers: layers of the generative head's depth transformer.
    dropout: rate everywhere.
    item_dropout: share of the items that lack their own vectors in a training step.
    max_length: T, the longest history.
    num_streams: streams whose similarity reweights attention; 0 gives the plain backbone.
    cross_pairs: whether pairs of different streams have tables too.
    num_buckets: similarity buckets; 0 where the bias is continuous.
    attention: its implementation, see `ops.attention`.
    num_negatives: items that stand for the catalogue in a training step of the dense head; 0: the catalogue itself.
    softmax_over: what a code of the generative head competes with: the codes that lead on to items ("existing"), or
      "all" K.
    dense_width: of the dense tower of the hybrid, see `TwoTowers`, like `width`.
    dense_mlp_width: of the dense tower, like `mlp_width`.
    dense_dropout: of the dense tower, like `dropout`.
    subtree_logits: whether the generative head also scores a code by the items that it leads on to.
    seen_item_bias: whether what is in the history already has a learned number added to its score.
    dtype: that the model computes in; parameters, scores, softmaxes and losses are float32 whatever it is.
  """

  num_items: int
  num_levels: int = 4
  num_codes: int = 256
  num_columns: int = 4
  item_embedding: bool = True
  feature_width: int = 0
  backbone: str = "causal"
  head: str = "generative"
  width: int = 64
  num_layers: int = 2
  num_heads: int = 2
  head_width: int = 32
  positions: str = "learned"
  position_buckets: int = 32
  time_buckets: int = 0
  mlp_width: int = 256
  depth_layers: int = 1
  dropout: float = 0.3
  item_dropout: float = 0.0
  max_length: int = 20
  num_streams: int = 2
  cross_pairs: bool = True
  num_buckets: int = 32
  attention: str = "einsum"
  num_negatives: int = 0
  softmax_over: str = "existing"
  dense_width: int = 128
  dense_mlp_width: int = 512
  dense_dropout: float = 0.5
  subtree_logits: bool = False
  seen_item_bias: bool = False
  dtype: str = "float32"

  @property
  def pairs(self) -> tuple[tuple[int, int], ...]:
    """The stream pairs that have a bias table."""
    return stream_pairs(self.num_streams, cross=self.cross_pairs)

  @property
  def table_shape(self) -> tuple[int, ...]:
    """[P, H, n_buckets + 2], or [P, H, 3] where the bias is continuous."""
    return (len(self.pairs), self.num_heads, self.num_buckets + 2 if self.num_buckets else 3)


@flax.struct.dataclass
class Catalogue:
  """What the model is told about items; data, not parameters.

  Attributes:
    semantic_ids: [N, L] int32, each item's own ID.
    columns: [N, C] int32: rows of the code embedding whose sum is the item's semantic vector; -1 where a modality is
      absent.
    streams: what the similarities that reweight attention are of: [N, S, d_code] float32 quantized vectors, zero rows
      where absent, or [N, S, L] int32 codes, -1 where absent.
    edges: [P, n_buckets - 1] float32 bucket edges of each stream pair.
    features: [N, F] float32 standardised features, zero where absent; None where the recommender reads none.
    trie: of the semantic IDs, for the heads that search; None where the recommender reads no codes.
  """

  semantic_ids: jax.Array
  columns: jax.Array
  streams: jax.Array
  edges: jax.Array
  features: jax.Array | None = None
  trie: Trie | None = None

  @property
  def num_items(self) -> int:
    """N."""
    return self.semantic_ids.shape[0]

  def code_log_probs(
    self,
    logits: Sequence[jax.Array],
    items: jax.Array,
    *,
    softmax_over: str,
    subtree_logits: Callable[[int, jax.Array], jax.Array] | None = None,
  ) -> jax.Array:
    """Log-probability of each code of given items' IDs, each given those before it.

    Over "existing" codes, the softmax runs over the children of the trie's node alone: the probabilities of all items
    then sum to one, and nothing is spent on learning which IDs exist, which a search knows anyway (this project's
    choice).

    Args:
      logits: L times [P, K], of every level given the item's codes before it.
      items: [P] int.
      softmax_over: "existing" or "all".
      subtree_logits: (level, nodes of the trie [P, F]) -> [P, F], added to the logits of the nodes' codes; None adds
        nothing. Only over "existing" codes.

    Returns:
      [P, L] float32.
    """
    codes = self.semantic_ids[items]
    log_probs = []
    for level, of_level in enumerate(logits):
      if softmax_over == "all":
        own = jnp.take_along_axis(of_level, codes[:, level, None], axis=-1)[:, 0]
        log_probs.append(own - jax.nn.logsumexp(of_level, axis=-1))
        continue
      assert self.trie is not None
      nodes, among, valid = self.trie.children(level, self.trie.parents(level, items))
      children = jnp.take_along_axis(of_level, among, axis=-1)
      if subtree_logits is not None:
        children = children + subtree_logits(level, nodes)
      children = jax.nn.log_softmax(jnp.where(valid, children, -jnp.inf), axis=-1)
      own = valid & (among == codes[:, level, None])
      log_probs.append(jnp.sum(jnp.where(own, children, 0.0), axis=-1))
    return jnp.stack(log_probs, axis=1)


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
