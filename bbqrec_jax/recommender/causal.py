"""The causal backbone: one position per item, histories packed into rows."""

from typing import Any

import flax.linen as nn
import jax

from bbqrec_jax.errors import InputError
from bbqrec_jax.layers.transformer import CausalBackbone
from bbqrec_jax.recommender.parts import Backbone
from bbqrec_jax.recommender.settings import RecommenderSettings


class Causal(Backbone):
  """`CausalBackbone` by the recommender's settings; its parameters are those of that, at the same place."""

  @classmethod
  def check(cls, settings: RecommenderSettings, prefix: str) -> None:
    """See `Backbone`."""
    if settings.time_buckets and settings.rows == "histories":
      raise InputError(
        f"config field {prefix}time_buckets = {settings.time_buckets} needs {prefix}rows = 'packed': set it so, or"
        f" {prefix}time_buckets to 0"
      )
    if settings.positions == "relative" and not 2 <= settings.position_buckets <= 255:
      raise InputError(
        f"config field {prefix}position_buckets must be 2 to 255 where {prefix}positions = 'relative', got"
        f" {settings.position_buckets}"
      )
    if settings.width % settings.num_heads:
      raise InputError(
        f"config field {prefix}width = {settings.width} must be a multiple of {prefix}num_heads = {settings.num_heads}"
      )

  def setup(self):
    """Makes the layers."""
    s = self.settings
    self.layers = CausalBackbone(
      num_layers=s.num_layers,
      num_heads=s.num_heads,
      mlp_width=s.mlp_width,
      max_length=s.max_length,
      dropout=s.dropout,
      relative_buckets=s.position_buckets if s.positions == "relative" else 0,
      time_buckets=s.time_buckets,
      attention_dropout=s.dropout if s.norm == "post" else 0.0,
      post_norm=s.norm == "post",
      whole_rows=not s.packed,
    )
    nn.share_scope(self, self.layers)

  def __call__(
    self,
    x: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    bias: jax.Array | None = None,
    times: jax.Array | None = None,
    *,
    deterministic: bool = True,
  ) -> jax.Array:
    """See `CausalBackbone`."""
    return self.layers(x, segments, positions, bias, times, deterministic=deterministic)

  def last_states(self, x: jax.Array, segments: jax.Array, *more: Any) -> jax.Array:
    """See `Backbone`: the last layer makes no others."""
    return self.layers(x, segments, *more, last_alone=True, deterministic=True)
