"""The generative head of the causal backbone: the next item's codes one by one, from one state.

Its `items` are `heads.Items`.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from bbqrec_jax.layers.dense import Dense
from bbqrec_jax.layers.transformer import TransformerLayer
from bbqrec_jax.recommender.subtree_logits import Addition, SubtreeLogits, additions, search_logits, training_logits
from bbqrec_jax.semantic_ids.beam import BeamResult, beam_search, item_log_probs


class GenerativeHead(nn.Module):
  """Predicts the L codes of the next item one after another, from one state: a depth transformer (RQ-Transformer).

  The input of level l is the state, plus the embeddings of the codes before it, plus an embedding of the level.

  Attributes:
    num_levels: L.
    num_codes: K.
    width: d.
    num_layers: layers of the depth transformer.
    num_heads: its heads.
    mlp_width: width of its feed-forward parts.
    dropout: its dropout rate.
    softmax_over: what a code competes with: the codes that lead on to items ("existing"), or "all" K.
    num_items: N, where a code is also scored by the items that it leads on to, see `SubtreeLogits`; 0: by itself alone.
    seen_item_bias: whether what the history has of the items that a code leads on to counts more, or less, than other
      items do, by a learned number a level, see `additions`.
  """

  num_levels: int
  num_codes: int
  width: int
  num_layers: int
  num_heads: int
  mlp_width: int
  dropout: float = 0.0
  softmax_over: str = "existing"
  num_items: int = 0
  seen_item_bias: bool = False
  exact: ClassVar[bool] = False
  reads_history: ClassVar[bool] = True

  def setup(self):
    """Makes the parameters and submodules."""
    if self.num_items:
      self.subtree_logits = SubtreeLogits(self.num_items)
    if self.seen_item_bias:
      self.offsets = self.param("seen_item_bias", nn.initializers.zeros, (self.num_levels,), jnp.float32)
    # Unit-variance rows: codes carry all that one level knows of the level before (0.02 starves their logits).
    self.code_embedding = self.param(
      "code_embedding", nn.initializers.normal(1.0), (self.num_levels, self.num_codes, self.width), jnp.float32
    )
    self.level_embedding = self.param(
      "level_embedding", nn.initializers.normal(0.02), (self.num_levels, self.width), jnp.float32
    )
    self.layers = [
      TransformerLayer(self.num_heads, self.mlp_width, self.dropout, name=f"layer_{index}")
      for index in range(self.num_layers)
    ]
    self.norm = nn.LayerNorm()
    self.outputs = [
      Dense(self.num_codes, dtype=jnp.float32, name=f"output_{level}") for level in range(self.num_levels)
    ]

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
    for level in range(self.num_levels - 1):
      before.append(before[-1] + self.code_embedding[level][codes[:, level]])
    x = states[:, None] + jnp.stack(before, axis=1) + self.level_embedding[None]
    mask = jnp.tril(jnp.ones((self.num_levels, self.num_levels), bool))
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
    log_probs = jax.nn.log_softmax(logits).reshape(batch, beams, self.num_codes)
    return log_probs, {"input": summed, "caches": unfolded, "hidden": hidden.reshape(batch, beams, width)}

  def losses(self, items: Any, states: jax.Array, targets: jax.Array, *, deterministic: bool) -> dict[str, jax.Array]:
    """The negative log-likelihood of each code of the targets' IDs, `nll_level_1` [P] and on."""
    logits, hidden = self(states, items.catalogue.semantic_ids[targets], deterministic=deterministic)
    log_probs = items.catalogue.code_log_probs(
      logits, targets, softmax_over=self.softmax_over, subtree_logits=training_logits(self._additions(items), hidden)
    )
    return {f"nll_level_{level + 1}": -log_probs[:, level] for level in range(self.num_levels)}

  def _additions(self, items: Any) -> Addition | None:
    """What is added to the scores of the trie's nodes; None where nothing."""
    tables = self.subtree_logits(items) if self.num_items else None
    return additions(items, tables, self.offsets if self.seen_item_bias else None)

  def _walk(self, items: Any, states: jax.Array) -> dict[str, Any]:
    """What `beam_search` and `item_log_probs` take."""
    return {
      "trie": items.catalogue.trie,
      "step": self.step,
      "state": self.start(states),
      "normalize": self.softmax_over == "existing",
      "subtree_logits": search_logits(self._additions(items)),
    }

  def search(self, items: Any, states: jax.Array, *, width: int, exclude: jax.Array | None = None) -> BeamResult:
    """The `width` most probable items by beam search over the trie; see `beam_search`."""
    return beam_search(**self._walk(items, states), batch=states.shape[0], width=width, exclude=exclude)

  def log_probs(self, items: Any, states: jax.Array, some: jax.Array) -> jax.Array:
    """Log-probabilities of the IDs of `some` items, [B, n] int -> [B, n] float32; as `losses` counts them."""
    return item_log_probs(**self._walk(items, states), items=some)
