"""The training steps: pure functions of (state, shared data, batch), the same on one device and on many."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bbqrec_jax.models.recommender import Catalogue, Recommender
from bbqrec_jax.models.tokenizer import LossWeights, Tokenizer, tokenizer_loss
from bbqrec_jax.ops.quantize import perplexity, revive_codes
from bbqrec_jax.train.parallel import StepFunction, reduce_shares
from bbqrec_jax.train.state import TrainState, step_key

Metrics = dict[str, jax.Array]


def _updated(
  state: TrainState, optimizer: optax.GradientTransformation, gradients: Any, metrics: Metrics
) -> tuple[TrainState, Metrics]:
  updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = metrics | {"gradient_norm": optax.global_norm(gradients)}
  return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics  # type: ignore[attr-defined]


def make_tokenizer_step(
  model: Tokenizer,
  optimizer: optax.GradientTransformation,
  *,
  weights: LossWeights,
  commitment: float,
  temperature: float,
  warmup_steps: int,
  revival_patience: int,
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

  Returns:
    step(state, shared, batch, *, axis_name) -> (state, metrics); `shared` is unused.
  """

  def step(state: TrainState, shared: None, batch: Any, *, axis_name: str | None) -> tuple[TrainState, Metrics]:
    del shared
    quantized = state.step >= warmup_steps

    def loss_function(params):
      return tokenizer_loss(
        model,
        params,
        batch,
        weights=weights,
        quantized=quantized,
        commitment=commitment,
        temperature=temperature,
        key=step_key(state, axis_name),
        axis_name=axis_name,
      )

    (loss, output), gradients = jax.value_and_grad(loss_function, has_aux=True)(state.params)
    loss, terms, counts, gradients = reduce_shares((loss, output.terms, output.counts, gradients), axis_name)
    metrics = {"loss": loss, **terms, "perplexity_level_1": perplexity(counts[0])}
    state, metrics = _updated(state, optimizer, gradients, metrics)

    idle = jnp.where(counts > 0, 0, state.idle + 1)
    if revival_patience:
      residuals, valid = output.residuals, output.valid
      if axis_name is not None:
        # Every device must move the same codes to the same places.
        residuals = jax.lax.all_gather(residuals, axis_name, axis=1, tiled=True)
        valid = jax.lax.all_gather(valid, axis_name, tiled=True)
      key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)
      codebooks, idle = jax.vmap(revive_codes, in_axes=(0, 0, 0, 0, None, None))(
        jax.random.split(key, len(idle)), state.params["codebooks"], idle, residuals, valid, revival_patience
      )
      codebooks = jnp.where(quantized, codebooks, state.params["codebooks"])
      state = state.replace(params=state.params | {"codebooks": codebooks})  # type: ignore[attr-defined]
    return state.replace(idle=jnp.where(quantized, idle, 0)), metrics  # type: ignore[attr-defined]

  return step


def make_recommender_step(model: Recommender, optimizer: optax.GradientTransformation) -> StepFunction:
  """The step of stage 2: step(state, catalogue, batch, *, axis_name) -> (state, metrics)."""

  def step(state: TrainState, catalogue: Catalogue, batch: Any, *, axis_name: str | None) -> tuple[TrainState, Metrics]:
    def loss_function(params):
      return model.apply(
        {"params": params},
        catalogue,
        batch,
        deterministic=False,
        axis_name=axis_name,
        method="loss",
        rngs={"dropout": step_key(state, axis_name)},
      )

    (loss, terms), gradients = jax.value_and_grad(loss_function, has_aux=True)(state.params)
    loss, terms, gradients = reduce_shares((loss, terms, gradients), axis_name)
    return _updated(state, optimizer, gradients, {"loss": loss, **terms})

  return step
