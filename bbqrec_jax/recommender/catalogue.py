"""What the recommender is told of the items of the catalogue."""

from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from bbqrec_jax.recommender.signals import SignalSources
from bbqrec_jax.semantic_ids.trie import Trie


@flax.struct.dataclass
class CandidateStreams:
  """What candidates are compared with the items of a history by.

  Attributes:
    vectors: of each stream of vectors, [N, d] float32 rows of length 1, or zero where an item lacks it.
    edges: [S, n - 1] float32, bucket edges of their cosines.
    neighbours: [N, K] int32 of the stream of behaviour, -1 fills; None without it.
    buckets: [N, K] int32, of their strengths.
    signals: what the network of signals reads; None without it.
  """

  vectors: tuple[jax.Array, ...]
  edges: jax.Array
  neighbours: jax.Array | None = None
  buckets: jax.Array | None = None
  signals: SignalSources | None = None

  @property
  def num_items(self) -> int:
    """N."""
    return next(stream.shape[0] for stream in (*self.vectors, self.neighbours) if stream is not None)


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
    candidates: what candidates are compared with the history by; None where they are not.
  """

  semantic_ids: jax.Array
  columns: jax.Array
  streams: jax.Array
  edges: jax.Array
  features: jax.Array | None = None
  trie: Trie | None = None
  candidates: CandidateStreams | None = None

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
