"""Beam search over semantic IDs, constrained to the items that exist."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from bbqrec_jax.semantic_ids.trie import Trie

DecoderState = TypeVar("DecoderState")
StepFunction = Callable[[DecoderState, int, jax.Array | None], tuple[jax.Array, DecoderState]]
NodeFunction = Callable[[DecoderState, int, jax.Array], jax.Array]


class BeamResult(NamedTuple):
  """The best items of each row, best first.

  Attributes:
    items: [B, W] int32; -1 fills the end where fewer than W items exist or are allowed.
    log_probs: [B, W] float32, the log-probability of each item's semantic ID; -inf where there is no item.
  """

  items: jax.Array
  log_probs: jax.Array


def filled_beam(items: jax.Array, log_probs: jax.Array, *, width: int) -> BeamResult:
  """Items and log-probabilities [B, w], best first, with the W - w columns that lack filled: -1 and -inf."""
  missing = ((0, 0), (0, width - items.shape[1]))
  return BeamResult(
    items=jnp.pad(items, missing, constant_values=-1), log_probs=jnp.pad(log_probs, missing, constant_values=-jnp.inf)
  )


def best_candidates(items: jax.Array, scores: jax.Array, *, width: int) -> BeamResult:
  """The best `width` of given items by scores of any kind, [B, n] each; log-probabilities are among these items.

  Items of -1 are none, and come last.
  """
  none = items < 0
  log_probs = jax.nn.log_softmax(jnp.where(none, -jnp.inf, scores), axis=-1)
  best, order = jax.lax.top_k(jnp.where(none, -jnp.inf, log_probs), width)  # A row of none at all has no softmax.
  return BeamResult(items=jnp.take_along_axis(items, order, axis=1), log_probs=best)


def beam_search(
  trie: Trie,
  step: StepFunction[DecoderState],
  state: DecoderState,
  *,
  batch: int,
  width: int,
  normalize: bool = False,
  subtree_logits: NodeFunction[DecoderState] | None = None,
  exclude: jax.Array | None = None,
) -> BeamResult:
  """Searches the trie level by level; meant to be traced once, inside jit, as one program.

  Candidates are the children that the trie lists, never the whole vocabulary with a mask: an invalid ID cannot be
  formed, and a level costs its real fan-out. With a width of at least N the search is exact.

  Args:
    trie: the items' IDs.
    step: (state, level, codes) -> (log_probs [B, w, K], state). `codes` [B, w] are those chosen at the level before,
      None at level 0. The leaves of `state` are [B, w, ...]; the search reorders them as beams are kept. w is 1 at
      level 0.
    state: the decoder's first state, leaves [B, 1, ...].
    batch: B.
    width: W, how many beams are kept and returned.
    normalize: whether each level's probabilities are made to sum to one over the children of a beam's node, so that
      those of all items do; `step` may then return any logits.
    subtree_logits: (state, level, nodes [B, w, F]) -> [B, w, F], added to the log-probabilities of the codes; `state`
      is what `step` has just returned.
    exclude: [B, E] int, items that must not be returned; -1 fills. A node with nothing else under it is passed over at
      every level, so a beam of any width stays full while there are items.

  Returns:
    A `BeamResult` of W columns.
  """

  def best(level: int, parents: jax.Array, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    if exclude is not None:
      scores = jnp.where(trie.emptied(level, parents, exclude), -jnp.inf, scores)
    scores = scores.reshape(batch, -1)
    return jax.lax.top_k(scores, min(width, scores.shape[1], trie.codes[level].shape[0]))

  nodes, scores = _walk(trie, step, state, best, batch=batch, normalize=normalize, subtree_logits=subtree_logits)
  return filled_beam(jnp.where(jnp.isneginf(scores), -1, trie.items[nodes]), scores, width=width)


def item_log_probs(
  trie: Trie,
  step: StepFunction[DecoderState],
  state: DecoderState,
  items: jax.Array,
  *,
  normalize: bool = False,
  subtree_logits: NodeFunction[DecoderState] | None = None,
) -> jax.Array:
  """Log-probabilities of given items' IDs, those that a beam search that kept them would give.

  Level 0 costs as much as for one item, however many there are of a row.

  Args:
    trie: the items' IDs.
    step: as in `beam_search`.
    state: as in `beam_search`, leaves [B, 1, ...].
    items: [B, n] int.
    normalize: as in `beam_search`.
    subtree_logits: as in `beam_search`.

  Returns:
    [B, n] float32.
  """

  def theirs(level: int, parents: jax.Array, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    # At level 0 all stand under the root, the only parent; from then on each has a parent of its own, its own place.
    above = jnp.broadcast_to(jnp.arange(parents.shape[1], dtype=jnp.int32), items.shape)
    first = jnp.take_along_axis(trie.starts[level][parents], above, axis=1)
    chosen = above * trie.fanouts[level] + trie.paths[items, level] - first
    return jnp.take_along_axis(scores.reshape(items.shape[0], -1), chosen, axis=1), chosen

  batch = items.shape[0]
  return _walk(trie, step, state, theirs, batch=batch, normalize=normalize, subtree_logits=subtree_logits)[1]


def _walk(
  trie: Trie,
  step: StepFunction[DecoderState],
  state: DecoderState,
  choose: Callable[[int, jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
  *,
  batch: int,
  normalize: bool,
  subtree_logits: NodeFunction[DecoderState] | None,
) -> tuple[jax.Array, jax.Array]:
  """Goes down the trie, and at each level on from chosen nodes alone.

  Args:
    trie: this and what is not explained here is that of `beam_search`.
    step: (state, level, codes) -> (log_probs, state).
    state: leaves [B, 1, ...].
    choose: (level, parents [B, w], log-probabilities of their children [B, w, F], -inf where there are fewer) -> those
      of the chosen ones [B, k], and their places among the w F, [B, k] int.
    batch: B.
    normalize: whether the log-probabilities of siblings are made to sum to one.
    subtree_logits: (state, level, nodes [B, w, F]) -> [B, w, F].

  Returns:
    The nodes of the last level that were reached and their log-probabilities, each [B, k].
  """
  nodes = jnp.zeros((batch, 1), jnp.int32)
  scores = jnp.zeros((batch, 1), jnp.float32)
  codes: jax.Array | None = None
  for level in range(trie.num_levels):
    log_probs, state = step(state, level, codes)
    children, child_codes, valid = trie.children(level, nodes)
    log_probs = jnp.take_along_axis(log_probs.astype(jnp.float32), child_codes, axis=-1)
    if subtree_logits is not None:
      log_probs = log_probs + subtree_logits(state, level, children)
    log_probs = jnp.where(valid, log_probs, -jnp.inf)
    if normalize:
      log_probs = jax.nn.log_softmax(log_probs, axis=-1)
    scores, chosen = choose(level, nodes, scores[..., None] + log_probs)
    parents = chosen // trie.fanouts[level]
    nodes = jnp.take_along_axis(children.reshape(batch, -1), chosen, axis=1)
    codes = jnp.take_along_axis(child_codes.reshape(batch, -1), chosen, axis=1)
    state = jax.tree.map(
      lambda leaf, parents=parents: jnp.take_along_axis(
        leaf, parents.reshape(parents.shape + (1,) * (leaf.ndim - 2)), axis=1
      ),
      state,
    )
  return nodes, scores
