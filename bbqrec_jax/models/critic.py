"""The variational network of the CLUB bound: what can be told of a specific latent from the quantized one."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from bbqrec_jax.models.dense import Dense
from bbqrec_jax.models.encoders import MLP


class ClubCritic(nn.Module):
  """q(s_m | q_m) = N(mean(q_m), diag exp(log_variance(q_m))), one network a modality.

  Attributes:
    modalities: their names.
    width: d of both latents.
  """

  modalities: tuple[str, ...]
  width: int

  @nn.compact
  def __call__(self, quantized: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Modality -> [B, d] gives modality -> (mean, log_variance), each [B, d]; the log-variance is within -1 and 1."""
    result = {}
    for name in self.modalities:
      hidden = MLP((2 * self.width, 2 * self.width), name=f"{name}_hidden")(quantized[name])
      mean = Dense(self.width, name=f"{name}_mean")(nn.gelu(hidden))
      log_variance = jnp.tanh(Dense(self.width, name=f"{name}_log_variance")(nn.gelu(hidden)))
      result[name] = (mean, log_variance)
    return result
