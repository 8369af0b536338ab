"""Prediction heads: what turns the state of a history into a ranking of items."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bbqrec_jax.models.backbones import TransformerLayer


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
  """

  num_levels: int
  num_codes: int
  width: int
  num_layers: int
  num_heads: int
  mlp_width: int
  dropout: float = 0.0

  def setup(self):
    """Makes the parameters and submodules."""
    # Unit-variance rows: codes carry all that one level knows of the level before (0.02 starves their logits).
    self.code_embedding = self.param(
      "code_embedding", nn.initializers.normal(1.0), (self.num_levels, self.num_codes, self.width)
    )
    self.level_embedding = self.param("level_embedding", nn.initializers.normal(0.02), (self.num_levels, self.width))
    self.layers = [
      TransformerLayer(self.num_heads, self.mlp_width, self.dropout, name=f"layer_{index}")
      for index in range(self.num_layers)
    ]
    self.norm = nn.LayerNorm()
    self.outputs = [nn.Dense(self.num_codes, name=f"output_{level}") for level in range(self.num_levels)]

  def __call__(self, states: jax.Array, codes: jax.Array, *, deterministic: bool = True) -> jax.Array:
    """Logits of every level, given the true codes before it (teacher forcing).

    Args:
      states: [P, d].
      codes: [P, L] int, the semantic ID of the next item.
      deterministic: no dropout.

    Returns:
      [P, L, K] float32.
    """
    before = [jnp.zeros_like(states)]
    for level in range(self.num_levels - 1):
      before.append(before[-1] + self.code_embedding[level][codes[:, level]])
    x = states[:, None] + jnp.stack(before, axis=1) + self.level_embedding[None]
    mask = jnp.tril(jnp.ones((self.num_levels, self.num_levels), bool))
    for layer in self.layers:
      x, _ = layer(x, mask, deterministic=deterministic)
    x = self.norm(x)
    logits = [output(x[:, level]) for level, output in enumerate(self.outputs)]
    return jnp.stack(logits, axis=1).astype(jnp.float32)

  def start(self, states: jax.Array) -> dict[str, Any]:
    """The decoder state before the first code: states [B, d] -> leaves [B, 1, ...] for `beam_search`."""
    return {"input": states[:, None], "past": None}

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
    presents = []
    for index, layer in enumerate(self.layers):
      past = None if state["past"] is None else jax.tree.map(fold, state["past"][index])
      x, present = layer(x, mask, past=past, deterministic=True)
      presents.append(present)
    logits = self.outputs[level](self.norm(x[:, 0])).astype(jnp.float32)
    unfolded = jax.tree.map(lambda leaf: leaf.reshape(batch, beams, *leaf.shape[1:]), presents)
    log_probs = jax.nn.log_softmax(logits).reshape(batch, beams, self.num_codes)
    return log_probs, {"input": summed, "past": unfolded}
