"""The CLUB bound between the two latents of a modality, and the variational network that it is estimated with."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from bbqrec_jax.layers.apply import apply
from bbqrec_jax.layers.dense import Dense
from bbqrec_jax.ops.club import club_full, gaussian_log_likelihood
from bbqrec_jax.ops.reduction import masked_mean
from bbqrec_jax.tokenizer.encoders import MLP
from bbqrec_jax.tokenizer.losses import Bound
from bbqrec_jax.tokenizer.settings import TokenizerSettings
from bbqrec_jax.training.partitioning import reduce_shares


class ClubNetwork(nn.Module):
  """q(s_m | q_m) = N(mean(q_m), diag exp(log_variance(q_m))), one network per modality.

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


@dataclasses.dataclass(frozen=True)
class Disentangling:
  """How the CLUB bound is fitted and taken.

  Attributes:
    network: the network q(s_m | q_m).
    optimizer: its own.
    steps: likelihood steps it takes on each batch, before the next one's main step.
  """

  network: ClubNetwork
  optimizer: optax.GradientTransformation
  steps: int

  def bound(self, params: Any, *, axis_name: str | None) -> Bound:
    """The bound with the network held fixed; every row of the global batch is a negative."""

    def total(quantized, specific, present):
      predicted = apply(self.network, jax.lax.stop_gradient(params), "__call__", quantized)
      value = jnp.zeros((), jnp.float32)
      for name, (mean, log_variance) in sorted(predicted.items()):
        value += club_full(mean, log_variance, specific[name], present[name], axis_name=axis_name)
      return value

    return total

  def update(
    self,
    params: Any,
    opt_state: optax.OptState,
    quantized: dict[str, jax.Array],
    specific: dict[str, jax.Array],
    present: dict[str, jax.Array],
    *,
    axis_name: str | None,
  ) -> tuple[Any, optax.OptState, jax.Array]:
    """Likelihood steps on latents that carry no gradient: (params, opt_state, log-likelihood before the last step)."""

    def surprise(params):
      predicted = apply(self.network, params, "__call__", quantized)
      value = jnp.zeros((), jnp.float32)
      for name, (mean, log_variance) in predicted.items():
        likelihood = gaussian_log_likelihood(mean, log_variance, specific[name])
        value -= masked_mean(likelihood, present[name], axis_name=axis_name)
      return value

    def one(carry, _):
      params, opt_state = carry
      value, gradients = reduce_shares(jax.value_and_grad(surprise)(params), axis_name)
      updates, opt_state = self.optimizer.update(gradients, opt_state, params)
      return (optax.apply_updates(params, updates), opt_state), -value

    (params, opt_state), likelihoods = jax.lax.scan(one, (params, opt_state), None, length=self.steps)
    return params, opt_state, likelihoods[-1]


def make_disentangling(settings: TokenizerSettings) -> Disentangling | None:
  """What the settings say of the bound; None where its weight is 0."""
  if not settings.weights.disentangle:
    return None
  network = ClubNetwork(settings.names, settings.code_width)
  return Disentangling(network, optax.adam(settings.club.learning_rate), settings.club.steps)
