"""Logits of a node of the trie from the items under it, beside the logit of its code."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class SubtreeTables(NamedTuple):
  """Of each level of the trie.

  Attributes:
    masses: [n] float32, the log of the prior of the items under each node.
    vectors: [n, d] float32, their mean by that prior.
  """

  masses: list[jax.Array]
  vectors: list[jax.Array]

  def scores(self, hidden: jax.Array, level: int, nodes: jax.Array) -> jax.Array:
    """The score of nodes given the decoder's state: hidden [..., d], nodes [..., F] -> [..., F] float32."""
    mass, vectors = self.masses[level], self.vectors[level]
    if len(vectors) <= 2 * nodes.shape[-1]:
      # All nodes are candidates, or nearly: one product with all of them beats gathering them for each position.
      every = jnp.dot(hidden, vectors.T, preferred_element_type=jnp.float32)
      return jnp.take_along_axis(every, nodes, axis=-1) + mass[nodes]
    chosen = vectors[nodes]
    return mass[nodes] + jnp.einsum("...d,...fd->...f", hidden, chosen, preferred_element_type=jnp.float32)


class SubtreeLogits(nn.Module):
  """Logits of nodes from the items under them (this project's choice).

  With a prior b_i and a vector v_i for each item, a full softmax gives what is under a node the score

      log sum_i exp(b_i + h v_i)  =  log sum_i exp(b_i) + h (mean of v_i by the prior) + ...

  of which these two terms are kept: a score that costs what the nodes cost, and is exact at the items themselves. A
  code then has one vector wherever it stands, its own, and one for the place in the trie where it stands.

  Attributes:
    num_items: N that the model is trained on; items that come later have the mean prior.
  """

  num_items: int

  @nn.compact
  def __call__(self, items: Any) -> SubtreeTables:
    """The tables of all nodes, from `parts.Items`."""
    prior = self.param("prior", nn.initializers.zeros, (self.num_items,), jnp.float32).astype(jnp.float32)
    new = items.catalogue.num_items - self.num_items
    if new:
      prior = jnp.concatenate([prior, jnp.full(new, jnp.mean(prior))])
    return SubtreeTables(*items.catalogue.trie.pooled(prior, items.vectors()))


Addition = Callable[[jax.Array, int, jax.Array], jax.Array]
# Of learned biases: Adam moves a parameter by about its learning rate a step, and these have some way to go.
BIAS_UNIT = 10.0


def additions(items: Any, tables: SubtreeTables | None, biases: jax.Array | None) -> Addition | None:
  """What is added to the scores of nodes: (decoder's state [..., d], level, nodes [..., F]) -> [..., F] float32.

  A bias o says that an item of the history counts as much as exp(o) others. A node of which the history has the
  share f then has log(1 - f + f exp(o)) added to its score: o once all that it leads to is in the history.

  Args:
    items: `parts.Items`.
    tables: of `SubtreeLogits`, or None.
    biases: [L], of each level, in `BIAS_UNIT`, or None.

  Returns:
    None where nothing is added.
  """
  if tables is None and biases is None:
    return None

  def add(hidden: jax.Array, level: int, nodes: jax.Array) -> jax.Array:
    total = jnp.zeros((), jnp.float32) if tables is None else tables.scores(hidden, level, nodes)
    if biases is None:
      return total
    share = items.catalogue.trie.share(level, nodes, items.seen)
    bias = BIAS_UNIT * biases[level].astype(jnp.float32)
    return total + jnp.logaddexp(jnp.log1p(-share), jnp.log(share) + bias)

  return add


def training_logits(add: Addition | None, hidden: jax.Array) -> Callable[[int, jax.Array], jax.Array] | None:
  """For `Catalogue.code_log_probs`: hidden [P, L, d], the decoder's state before each level."""
  if add is None:
    return None
  return lambda level, nodes: add(hidden[:, level], level, nodes)


def search_logits(add: Addition | None) -> Callable[[Any, int, jax.Array], jax.Array] | None:
  """For `beam_search`, where the decoder's state has its `hidden` [B, w, d]."""
  if add is None:
    return None
  return lambda state, level, nodes: add(state["hidden"], level, nodes)
