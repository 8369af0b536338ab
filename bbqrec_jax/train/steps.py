"""The training steps: pure functions of (state, shared data, batch), the same on one device and on many."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bbqrec_jax.models.apply import apply
from bbqrec_jax.models.critic import ClubCritic
from bbqrec_jax.models.recommender import Catalogue, Recommender
from bbqrec_jax.models.tokenizer import Bound, LossWeights, Tokenizer, tokenizer_loss
from bbqrec_jax.ops.club import club_full, club_sampled, gaussian_log_likelihood
from bbqrec_jax.ops.quantize import perplexity, revive_codes
from bbqrec_jax.ops.reduction import masked_mean
from bbqrec_jax.train.parallel import StepFunction, reduce_shares
from bbqrec_jax.train.state import TrainState, step_key

Metrics = dict[str, jax.Array]


def _updated(
  state: TrainState, optimizer: optax.GradientTransformation, gradients: Any, metrics: Metrics
) -> tuple[TrainState, Metrics]:
  updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = metrics | {"gradient_norm": optax.tree.norm(gradients)}
  return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Disentangling:
  """How the CLUB bound is fitted and taken.

  Attributes:
    critic: the network q(s_m | q_m).
    optimizer: its own.
    steps: likelihood steps it takes on each batch, before the next one's main step.
    full: every row of the global batch is a negative; otherwise one drawn row is.
  """

  critic: ClubCritic
  optimizer: optax.GradientTransformation
  steps: int = 5
  full: bool = True

  def bound(self, params: Any, *, key: jax.Array, axis_name: str | None) -> Bound:
    """The bound with the network held fixed."""

    def total(quantized, specific, present):
      predicted = apply(self.critic, jax.lax.stop_gradient(params), "__call__", quantized)
      value = jnp.asarray(0.0)
      for index, (name, (mean, log_variance)) in enumerate(sorted(predicted.items())):
        rows = (mean, log_variance, specific[name], present[name])
        if self.full:
          value += club_full(*rows, axis_name=axis_name)
        else:
          value += club_sampled(*rows, key=jax.random.fold_in(key, index), axis_name=axis_name)
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
      predicted = apply(self.critic, params, "__call__", quantized)
      value = jnp.asarray(0.0)
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


def make_tokenizer_step(
  model: Tokenizer,
  optimizer: optax.GradientTransformation,
  *,
  weights: LossWeights,
  commitment: float,
  temperature: float,
  warmup_steps: int,
  revival_patience: int,
  disentangling: Disentangling | None = None,
) -> StepFunction:
  """The step of stage 1.

  Args:
    model: the tokenizer.
    optimizer: of all its parameters.
    weights: of the losses.
    commitment: beta of the quantization loss.
    temperature: of the contrast.
    warmup_steps: steps on unquantized latents; the codebooks are fitted to the latents when they end.
    revival_patience: steps without use after which a code is moved to a live residual; 0 never moves one.
    disentangling: the CLUB bound; None leaves it out. Its network is fitted to the latents of each batch after the main
      step, so that the next one judges it on rows it has not been fitted to.

  Returns:
    step(state, shared, batch, *, axis_name) -> (state, metrics); `shared` is unused.
  """

  def step(state: TrainState, shared: None, batch: Any, *, axis_name: str | None) -> tuple[TrainState, Metrics]:
    del shared
    quantized = state.step >= warmup_steps
    key = step_key(state, axis_name)
    bound = None
    if disentangling is not None:
      bound = disentangling.bound(state.critic, key=jax.random.fold_in(key, 2), axis_name=axis_name)

    def loss_function(params):
      return tokenizer_loss(
        model,
        params,
        batch,
        weights=weights,
        quantized=quantized,
        commitment=commitment,
        temperature=temperature,
        bound=bound,
        key=key,
        axis_name=axis_name,
      )

    (loss, output), gradients = jax.value_and_grad(loss_function, has_aux=True)(state.params)
    loss, terms, counts, gradients = reduce_shares((loss, output.terms, output.counts, gradients), axis_name)
    metrics = {"loss": loss, **terms, "perplexity_level_1": perplexity(counts[0])}
    # A number that no device has, so that no device's dropout draws from this key.
    revival_key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 2**32 - 1)
    state, metrics = _updated(state, optimizer, gradients, metrics)
    if disentangling is not None:
      critic, critic_opt_state, likelihood = disentangling.update(
        state.critic,
        state.critic_opt_state,
        output.quantized,
        output.specific,
        batch["present"],
        axis_name=axis_name,
      )
      state = state.replace(critic=critic, critic_opt_state=critic_opt_state)  # type: ignore[attr-defined]
      metrics["critic_likelihood"] = likelihood

    assert state.idle is not None
    idle = jnp.where(counts > 0, 0, state.idle + 1)
    if revival_patience:
      residuals, valid = output.residuals, output.valid
      if axis_name is not None:
        # Every device must move the same codes to the same places.
        residuals = jax.lax.all_gather(residuals, axis_name, axis=2, tiled=True)
        valid = jax.lax.all_gather(valid, axis_name, axis=1, tiled=True)
      codebooks, idle = jax.vmap(revive_codes, in_axes=(0, 0, 0, 0, None, None))(
        jax.random.split(revival_key, len(idle)),
        state.params["codebooks"],
        idle,
        residuals.reshape(len(idle), -1, residuals.shape[-1]),
        valid.reshape(-1),
        revival_patience,
      )
      codebooks = jnp.where(quantized, codebooks, state.params["codebooks"])
      state = state.replace(params=state.params | {"codebooks": codebooks})  # type: ignore[attr-defined]
    return state.replace(idle=jnp.where(quantized, idle, 0)), metrics  # type: ignore[attr-defined]

  return step


def make_recommender_step(model: Recommender, optimizer: optax.GradientTransformation) -> StepFunction:
  """The step of stage 2: step(state, catalogue, batch, *, axis_name) -> (state, metrics)."""

  def step(state: TrainState, catalogue: Catalogue, batch: Any, *, axis_name: str | None) -> tuple[TrainState, Metrics]:
    def loss_function(params):
      rngs = {"dropout": step_key(state, axis_name)}
      return apply(model, params, "loss", catalogue, batch, deterministic=False, axis_name=axis_name, rngs=rngs)

    (loss, terms), gradients = jax.value_and_grad(loss_function, has_aux=True)(state.params)
    loss, terms, gradients = reduce_shares((loss, terms, gradients), axis_name)
    return _updated(state, optimizer, gradients, {"loss": loss, **terms})

  return step
