"""Feed-forward encoders and decoders of one modality."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from bbqrec_jax.layers.dense import Dense


class MLP(nn.Module):
  """Dense layers with GELU between them and none after the last.

  Attributes:
    widths: the width of each layer's output; the last is the output's.
  """

  widths: Sequence[int]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, D] -> [B, widths[-1]]."""
    for index, width in enumerate(self.widths):
      x = Dense(width)(x)
      if index + 1 < len(self.widths):
        x = nn.gelu(x)
    return x
