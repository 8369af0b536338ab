"""Prediction heads: what turns the state of a history into a ranking of items.

A head is a flax module with

- `losses(items, states [P, d], targets [P], *, deterministic)` -> the parts of its loss by name, each [P] float32;
- `exact`, and where that is True `scores(items, states [B, d])` -> [B, N], else
  `search(items, states [B, d], *, width, exclude)` -> `BeamResult`;
- `reads_history = True`, where it is to be told of the history behind each state (`items.seen`);
- where it knows a faster way to them than through each, `summed_losses(items, states, targets, weights [P], *,
  deterministic)` -> the parts, each summed over the positions as they weigh; and `log_probs(items, states [B, d],
  some [B, n])` -> [B, n], the sum of the parts for `some` items, with the sign turned.

`items` is an `Items`: the catalogue, and the vectors that the sequence model knows its items by.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bbqrec_jax.layers.dense import Dense
from bbqrec_jax.ops.ranking import add_to
from bbqrec_jax.ops.softmax import Raised, cross_entropy, sampled_cross_entropy, weighted_cross_entropy
from bbqrec_jax.recommender.catalogue import Catalogue, RecommenderSettings
from bbqrec_jax.recommender.encoder_decoder import DecoderHead
from bbqrec_jax.recommender.generative import GenerativeHead
from bbqrec_jax.recommender.settings import HEADS
from bbqrec_jax.recommender.subtree_logits import BIAS_UNIT
from bbqrec_jax.utils.named import named


class Items(NamedTuple):
  """What a head is told of the items.

  Attributes:
    catalogue: their semantic IDs, and the trie of those.
    vectors: items [...] int -> their vectors [..., d]; None gives all, [N, d].
    seen: [P, T] (or [B, T]) int, deduplicated history items per state, -1-padded; None where the
      settings, or the head, do without.
  """

  catalogue: Catalogue
  vectors: Callable[..., jax.Array]
  seen: jax.Array | None = None


def weighted(parts: dict[str, jax.Array], weights: jax.Array) -> dict[str, jax.Array]:
  """Sums each part [P] as the positions weigh; what weighs nothing may be anything."""
  return {
    name: jnp.sum(jnp.where(weights > 0, part.astype(jnp.float32) * weights, 0.0)) for name, part in parts.items()
  }


def summed_losses(
  head: Any, items: Items, states: Any, targets: jax.Array, weights: jax.Array, *, deterministic: bool
) -> dict[str, jax.Array]:
  """The parts of a head's loss, each a float32 scalar: the sum over positions as they weigh, [P] float32."""
  if hasattr(head, "summed_losses"):
    return head.summed_losses(items, states, targets, weights, deterministic=deterministic)
  return weighted(head.losses(items, states, targets, deterministic=deterministic), weights)


class DenseHead(nn.Module):
  """Full softmax over the catalogue: the product of the state and each item's vector (SASRec with cross-entropy).

  Attributes:
    num_negatives: items drawn at random in a training step to stand for the whole catalogue; 0 takes the catalogue.
    seen_item_bias: whether the items of the history have a learned number added to their logits (this project's
      choice): a product of vectors cannot well say "the like of these, but none of them".
  """

  num_negatives: int = 0
  seen_item_bias: bool = False
  exact: ClassVar[bool] = True
  reads_history: ClassVar[bool] = True

  def setup(self):
    """Makes the parameter."""
    if self.seen_item_bias:
      self.offset = self.param("seen_item_bias", nn.initializers.zeros, (), jnp.float32)

  def raised(self, items: Items) -> Raised | None:
    """What the items of the history have added to their scores; None where nothing."""
    if not self.seen_item_bias:
      return None
    assert items.seen is not None
    return Raised(items.seen, BIAS_UNIT * self.offset.astype(jnp.float32))

  def losses(self, items: Items, states: jax.Array, targets: jax.Array, *, deterministic: bool) -> dict[str, jax.Array]:
    """The negative log-likelihood of each target, `nll_dense` [P]; of drawn items an estimate of it, in training."""
    if self.num_negatives and not deterministic:
      key, num_items = self.make_rng("dropout"), items.catalogue.num_items
      drawn = jax.random.randint(key, (self.num_negatives,), 0, num_items, jnp.int32)
      surprise = sampled_cross_entropy(
        states, items.vectors(targets), items.vectors(drawn), targets, drawn, num_items=num_items,
        raised=self.raised(items),
      )  # fmt: skip
    else:
      surprise = cross_entropy(states, items.vectors(), targets, raised=self.raised(items))
    return {"nll_dense": surprise}

  def summed_losses(
    self, items: Items, states: jax.Array, targets: jax.Array, weights: jax.Array, *, deterministic: bool
  ) -> dict[str, jax.Array]:
    """The sum of `losses` as the positions weigh; the full softmax forms its gradient with its value."""
    if self.num_negatives and not deterministic:
      return weighted(self.losses(items, states, targets, deterministic=deterministic), weights)
    return {"nll_dense": weighted_cross_entropy(states, items.vectors(), targets, weights, raised=self.raised(items))}

  def scores(self, items: Items, states: jax.Array) -> jax.Array:
    """Logits of all items, [B, N] float32."""
    logits = jnp.dot(states, items.vectors().T, preferred_element_type=jnp.float32)
    more = self.raised(items)
    return logits if more is None else add_to(logits, more.items, more.by)


class ParallelHead(nn.Module):
  """Predicts the L codes of the next item from one state, each without regard to the others (as RPG does).

  Items are scored exactly: the score of an item is the sum of its codes' log-probabilities.

  Attributes:
    num_levels: L.
    num_codes: K.
    mlp_width: width of each level's residual feed-forward part.
  """

  num_levels: int
  num_codes: int
  mlp_width: int
  exact: ClassVar[bool] = True

  @nn.compact
  def __call__(self, states: jax.Array) -> jax.Array:
    """Log-probabilities of the codes of every level: [P, d] -> [L, P, K] float32."""
    levels = []
    for level in range(self.num_levels):
      hidden = nn.gelu(Dense(self.mlp_width, name=f"hidden_{level}")(states))
      hidden = states + Dense(states.shape[-1], name=f"out_{level}")(hidden)
      output = Dense(self.num_codes, dtype=jnp.float32, name=f"output_{level}")
      levels.append(jax.nn.log_softmax(output(nn.LayerNorm(name=f"norm_{level}")(hidden))))
    return jnp.stack(levels)

  def losses(self, items: Items, states: jax.Array, targets: jax.Array, *, deterministic: bool) -> dict[str, jax.Array]:
    """The negative log-likelihood of each code of the targets' IDs, `nll_level_1` [P] and on."""
    del deterministic
    codes = items.catalogue.semantic_ids[targets]
    log_probs = self(states)
    return {
      f"nll_level_{level + 1}": -jnp.take_along_axis(log_probs[level], codes[:, level, None], axis=1)[:, 0]
      for level in range(self.num_levels)
    }

  def scores(self, items: Items, states: jax.Array) -> jax.Array:
    """Sums of the log-probabilities of each item's codes, [B, N] float32."""
    codes = items.catalogue.semantic_ids
    levels = [log_probs[:, codes[:, level]] for level, log_probs in enumerate(self(states))]
    return sum(levels[1:], start=levels[0])


def generative(s: RecommenderSettings) -> GenerativeHead:
  """The generative head of the settings."""
  return GenerativeHead(
    s.num_levels, s.num_codes, s.width, s.depth_layers, s.num_heads, s.mlp_width, s.dropout, s.softmax_over,
    s.num_items if s.subtree_logits else 0, s.seen_item_bias,
  )  # fmt: skip


def dense(s: RecommenderSettings) -> DenseHead:
  """The dense head of the settings."""
  return DenseHead(s.num_negatives, s.seen_item_bias)


def parallel(s: RecommenderSettings) -> ParallelHead:
  """The parallel head of the settings."""
  return ParallelHead(s.num_levels, s.num_codes, s.mlp_width)


def make_head(settings: RecommenderSettings) -> Any:
  """The head that the settings name.

  Args:
    settings: `head` is one of `HEADS`, or "module:function", where the function is given the settings and returns a
      head.

  Raises:
    ValueError: if there is no such module or function.
  """
  if settings.backbone == "encoder_decoder" and settings.head == "generative":
    return DecoderHead(settings)
  return named(settings.head, HEADS)(settings)
