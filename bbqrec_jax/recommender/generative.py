"""The generative head of the causal backbone: the next item's codes one by one, from one state."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from bbqrec_jax.errors import InputError
from bbqrec_jax.layers.dense import Dense
from bbqrec_jax.layers.transformer import TransformerLayer
from bbqrec_jax.recommender.encoder_decoder import DecoderHead
from bbqrec_jax.recommender.parts import Head, Items
from bbqrec_jax.recommender.settings import RecommenderSettings
from bbqrec_jax.recommender.subtree_logits import Addition, SubtreeLogits, additions, search_logits, training_logits
from bbqrec_jax.semantic_ids.beam import BeamResult, beam_search, item_log_probs


class GenerativeHead(Head):
  """Predicts the L codes of the next item one after another, from one state: a depth transformer (RQ-Transformer).

  The input of level l is the state, plus the embeddings of the codes before it, plus an embedding of the level.
  With `subtree_logits` a code is also scored by the items that it leads on to, see `SubtreeLogits`. With
  `seen_item_bias` what the history has of these counts more, or less, than other items do, by a learned number a level,
  see `additions`.
  """

  exact: ClassVar[bool] = False
  reads_history: ClassVar[bool] = True
  reads_codes: ClassVar[bool] = True
  memory_head: ClassVar[Any] = DecoderHead

  @classmethod
  def check(cls, settings: RecommenderSettings, prefix: str) -> None:
    """See `Head`."""
    if settings.width % settings.num_heads:
      raise InputError(
        f"config field {prefix}width = {settings.width} must be a multiple of {prefix}num_heads = {settings.num_heads}"
      )

  def setup(self):
    """Makes the parameters and submodules."""
    s = self.settings
    if s.subtree_logits:
      self.subtree_logits = SubtreeLogits(s.num_items)
    if s.seen_item_bias:
      self.seen_item_bias = self.param("seen_item_bias", nn.initializers.zeros, (s.num_levels,), jnp.float32)
    # Unit-variance rows: codes carry all that one level knows of the level before (0.02 starves their logits).
    self.code_embedding = self.param(
      "code_embedding", nn.initializers.normal(1.0), (s.num_levels, s.num_codes, s.width), jnp.float32
    )
    self.level_embedding = self.param(
      "level_embedding", nn.initializers.normal(0.02), (s.num_levels, s.width), jnp.float32
    )
    self.layers = [
      TransformerLayer(s.num_heads, s.mlp_width, s.dropout, name=f"layer_{index}") for index in range(s.depth_layers)
    ]
    self.norm = nn.LayerNorm()
    self.outputs = [Dense(s.num_codes, dtype=jnp.float32, name=f"output_{level}") for level in range(s.num_levels)]

  def __call__(
    self, states: jax.Array, codes: jax.Array, *, deterministic: bool = True
  ) -> tuple[list[jax.Array], jax.Array]:
    """Logits of every level, given the true codes before it (teacher forcing), and the states they are of.

    Args:
      states: [P, d].
      codes: [P, L] int, the semantic ID of the next item.
      deterministic: no dropout.

    Returns:
      L times [P, K] float32, and [P, L, d].
    """
    before = [jnp.zeros_like(states)]
    for level in range(self.settings.num_levels - 1):
      before.append(before[-1] + self.code_embedding[level][codes[:, level]])
    x = states[:, None] + jnp.stack(before, axis=1) + self.level_embedding[None]
    mask = jnp.tril(jnp.ones((self.settings.num_levels, self.settings.num_levels), bool))
    for layer in self.layers:
      x, _ = layer(x, mask, deterministic=deterministic)
    x = self.norm(x)
    return [output(x[:, level]) for level, output in enumerate(self.outputs)], x

  def start(self, states: jax.Array) -> dict[str, Any]:
    """The decoder state before the first code: states [B, d] -> leaves [B, 1, ...] for `beam_search`."""
    return {"input": states[:, None], "caches": None, "hidden": None}

  def step(self, state: dict[str, Any], level: int, codes: jax.Array | None) -> tuple[jax.Array, dict[str, Any]]:
    """Log-probabilities of one level's codes for every beam, each computed once: earlier levels are cached.

    Args:
      state: leaves [B, w, ...].
      level: the level to predict, from 0.
      codes: [B, w] chosen at the level before; None at level 0.

    Returns:
      ([B, w, K] float32 log-probabilities, the state for the next level).
    """
    summed = state["input"]
    if codes is not None:
      summed = summed + self.code_embedding[level - 1][codes]
    batch, beams, width = summed.shape

    def fold(leaf):
      return leaf.reshape(batch * beams, *leaf.shape[2:])

    x = (summed + self.level_embedding[level][None, None]).reshape(batch * beams, 1, width)
    mask = jnp.ones((1, level + 1), bool)
    caches = []
    for index, layer in enumerate(self.layers):
      cache = None if state["caches"] is None else jax.tree.map(fold, state["caches"][index])
      x, cache = layer(x, mask, cache=cache, deterministic=True)
      caches.append(cache)
    hidden = self.norm(x[:, 0])
    logits = self.outputs[level](hidden)
    unfolded = jax.tree.map(lambda leaf: leaf.reshape(batch, beams, *leaf.shape[1:]), caches)
    log_probs = jax.nn.log_softmax(logits).reshape(batch, beams, self.settings.num_codes)
    return log_probs, {"input": summed, "caches": unfolded, "hidden": hidden.reshape(batch, beams, width)}

  def losses(self, items: Items, states: jax.Array, targets: jax.Array, *, deterministic: bool) -> dict[str, jax.Array]:
    """The negative log-likelihood of each code of the targets' IDs, `nll_level_1` [P] and on."""
    logits, hidden = self(states, items.catalogue.semantic_ids[targets], deterministic=deterministic)
    log_probs = items.catalogue.code_log_probs(
      logits,
      targets,
      softmax_over=self.settings.softmax_over,
      subtree_logits=training_logits(self._additions(items), hidden),
    )
    return {f"nll_level_{level + 1}": -log_probs[:, level] for level in range(self.settings.num_levels)}

  def _additions(self, items: Items) -> Addition | None:
    """What is added to the scores of the trie's nodes; None where nothing."""
    s = self.settings
    tables = self.subtree_logits(items) if s.subtree_logits else None
    return additions(items, tables, self.seen_item_bias if s.seen_item_bias else None)

  def _walk(self, items: Items, states: jax.Array) -> dict[str, Any]:
    """What `beam_search` and `item_log_probs` take."""
    return {
      "trie": items.catalogue.trie,
      "step": self.step,
      "state": self.start(states),
      "normalize": self.settings.softmax_over == "existing",
      "subtree_logits": search_logits(self._additions(items)),
    }

  def search(self, items: Items, states: jax.Array, *, width: int, exclude: jax.Array | None = None) -> BeamResult:
    """The `width` most probable items by beam search over the trie; see `beam_search`."""
    return beam_search(**self._walk(items, states), batch=states.shape[0], width=width, exclude=exclude)

  def log_probs(self, items: Items, states: jax.Array, some: jax.Array) -> jax.Array:
    """Log-probabilities of the IDs of `some` items, [B, n] int -> [B, n] float32; as `losses` counts them."""
    return item_log_probs(**self._walk(items, states), items=some)
