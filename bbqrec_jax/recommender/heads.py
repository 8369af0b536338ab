"""Heads that score every item from one state: the dense one and the parallel one. The base is in `parts`."""

import math
from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from bbqrec_jax.layers.dense import Dense
from bbqrec_jax.ops.contrastive import normalize
from bbqrec_jax.ops.ranking import add_to
from bbqrec_jax.ops.softmax import Raised, cross_entropy, sampled_cross_entropy, weighted_cross_entropy
from bbqrec_jax.recommender.parts import Head, Items
from bbqrec_jax.recommender.subtree_logits import BIAS_UNIT

_TEMPERATURE = 0.07  # That cosines are divided by at first, as CLIP does.


class DenseHead(Head):
  """Full softmax over the catalogue: the product of the state and each item's vector (SASRec with cross-entropy).

  With `num_negatives`, items drawn at random in a training step stand for the whole catalogue, as they do by themselves
  in a large one, where a step then costs about half. With `seen_item_bias` the items of the history have a learned
  number added to their logits (this project's choice): a product of vectors cannot well say "the like of these, but
  none of them".

  With `cosine` both are of length one, and their products have a learned scale: an item's popularity is then in no
  vector's length, and an item that came after training has as long a vector as any.
  """

  reads_history: ClassVar[bool] = True

  def setup(self):
    """Makes the parameter."""
    if self.settings.seen_item_bias:
      self.seen_item_bias = self.param("seen_item_bias", nn.initializers.zeros, (), jnp.float32)
    if self.settings.cosine:
      self.log_scale = self.param("log_scale", nn.initializers.constant(math.log(1 / _TEMPERATURE)), (), jnp.float32)

  def compared(self, items: Items, states: jax.Array) -> tuple[Callable[..., jax.Array], jax.Array]:
    """What logits are products of: items [...] -> vectors [..., d], None for all; and states [P, d]."""
    if not self.settings.cosine:
      return items.vectors, states

    def unit(x: jax.Array) -> jax.Array:
      return normalize(x).astype(x.dtype)

    scaled = jnp.exp(self.log_scale.astype(jnp.float32)) * normalize(states)
    return lambda some=None: unit(items.vectors(some)), scaled.astype(states.dtype)

  def raised(self, items: Items) -> Raised | None:
    """What the items of the history have added to their scores; None where nothing."""
    if not self.settings.seen_item_bias:
      return None
    assert items.seen is not None
    return Raised(items.seen, BIAS_UNIT * self.seen_item_bias.astype(jnp.float32))

  def losses(self, items: Items, states: jax.Array, targets: jax.Array, *, deterministic: bool) -> dict[str, jax.Array]:
    """The negative log-likelihood of each target, `nll_dense` [P]; of drawn items an estimate of it, in training."""
    vectors, states = self.compared(items, states)
    if self.settings.drawn_items and not deterministic:
      key, num_items = self.make_rng("dropout"), items.catalogue.num_items
      drawn = jax.random.randint(key, (self.settings.drawn_items,), 0, num_items, jnp.int32)
      surprise = sampled_cross_entropy(
        states, vectors(targets), vectors(drawn), targets, drawn, num_items=num_items,
        raised=self.raised(items),
      )  # fmt: skip
    else:
      surprise = cross_entropy(states, vectors(), targets, raised=self.raised(items))
    return {"nll_dense": surprise}

  def summed_losses(
    self, items: Items, states: jax.Array, targets: jax.Array, weights: jax.Array, *, deterministic: bool
  ) -> dict[str, jax.Array]:
    """The sum of `losses` as the positions weigh; the full softmax forms its gradient with its value."""
    if self.settings.drawn_items and not deterministic:
      return super().summed_losses(items, states, targets, weights, deterministic=deterministic)
    vectors, states = self.compared(items, states)
    return {"nll_dense": weighted_cross_entropy(states, vectors(), targets, weights, raised=self.raised(items))}

  def scores(self, items: Items, states: jax.Array) -> jax.Array:
    """Logits of all items, [B, N] float32."""
    vectors, states = self.compared(items, states)
    logits = jnp.dot(states, vectors().T, preferred_element_type=jnp.float32)
    more = self.raised(items)
    return logits if more is None else add_to(logits, more.items, more.by)


class ParallelHead(Head):
  """Predicts the L codes of the next item from one state, each without regard to the others (as RPG does).

  Items are scored exactly: the score of an item is the sum of its codes' log-probabilities.
  """

  reads_codes: ClassVar[bool] = True

  @nn.compact
  def __call__(self, states: jax.Array) -> jax.Array:
    """Log-probabilities of the codes of every level: [P, d] -> [L, P, K] float32."""
    s, levels = self.settings, []
    for level in range(s.num_levels):
      hidden = nn.gelu(Dense(s.mlp_width, name=f"hidden_{level}")(states))
      hidden = states + Dense(states.shape[-1], name=f"out_{level}")(hidden)
      output = Dense(s.num_codes, dtype=jnp.float32, name=f"output_{level}")
      levels.append(jax.nn.log_softmax(output(nn.LayerNorm(name=f"norm_{level}")(hidden))))
    return jnp.stack(levels)

  def losses(self, items: Items, states: jax.Array, targets: jax.Array, *, deterministic: bool) -> dict[str, jax.Array]:
    """The negative log-likelihood of each code of the targets' IDs, `nll_level_1` [P] and on."""
    del deterministic
    codes = items.catalogue.semantic_ids[targets]
    log_probs = self(states)
    return {
      f"nll_level_{level + 1}": -jnp.take_along_axis(log_probs[level], codes[:, level, None], axis=1)[:, 0]
      for level in range(self.settings.num_levels)
    }

  def scores(self, items: Items, states: jax.Array) -> jax.Array:
    """Sums of the log-probabilities of each item's codes, [B, N] float32."""
    codes = items.catalogue.semantic_ids
    levels = [log_probs[:, codes[:, level]] for level, log_probs in enumerate(self(states))]
    return sum(levels[1:], start=levels[0])
