"""Encoders and decoders of one modality."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from bbqrec_jax.layers.dense import Dense
from bbqrec_jax.tokenizer.settings import ENCODERS, TokenizerSettings
from bbqrec_jax.utils.named import part


class Encoder(nn.Module):
  """The contract of an encoder: features of one modality in, latents out. A custom one is a subclass.

  Attributes:
    widths: `tokenizer.hidden`, then the width d of the output.
  """

  widths: Sequence[int]

  def __call__(self, x: jax.Array) -> jax.Array:
    """Standardised features [B, D] -> [B, widths[-1]]."""
    raise NotImplementedError


class MLP(Encoder):
  """Dense layers with GELU between them and none after the last."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, D] -> [B, widths[-1]]."""
    for index, width in enumerate(self.widths):
      x = Dense(width)(x)
      if index + 1 < len(self.widths):
        x = nn.gelu(x)
    return x


def encoder_class(settings: TokenizerSettings) -> type[Encoder]:
  """The class that the setting `encoder` names.

  Raises:
    InputError: if it names none.
  """
  return part("tokenizer.encoder", settings.encoder, ENCODERS, base=Encoder)
