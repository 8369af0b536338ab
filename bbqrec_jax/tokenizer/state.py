"""The state of stage 1."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from bbqrec_jax.training.state import TrainState


@flax.struct.dataclass
class TokenizerState(TrainState):
  """What a step of the tokenizer changes beside the parameters that the losses move.

  Attributes:
    usage: [G, L, K] float32, moving average of each code's share of the choices that make semantic IDs (see
      `TokenizerSettings.codebook_shape` for G).
    club: parameters of the CLUB bound's network; None where the bound is left out.
    club_opt_state: its own optimiser's.
  """

  usage: jax.Array
  club: Any = None
  club_opt_state: Any = None


def even_usage(shape: tuple[int, ...]) -> jax.Array:
  """`TokenizerState.usage` of codebooks [G, L, K, d] that are as good as new: all codes in equal use."""
  return jnp.full(shape[:-1], 1.0 / shape[-2], jnp.float32)
