"""What the training steps of both stages share: the optimiser's update, and skipping of non-finite steps."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from bbqrec_jax.training.optimizer import together
from bbqrec_jax.training.partitioning import StepFunction
from bbqrec_jax.training.state import TrainState

Metrics = dict[str, jax.Array]
State = TypeVar("State", bound=TrainState)


def updated(
  state: State, optimizer: optax.GradientTransformation, gradients: Any, metrics: Metrics
) -> tuple[State, Metrics]:
  """The state after a step of an optimiser, and the metrics with the norm of the gradients."""
  updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = metrics | {"gradient_norm": optax.tree.norm(together(gradients))}
  return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics  # type: ignore[attr-defined]


def skip_nonfinite(step: StepFunction) -> StepFunction:
  """The step, except that where its metrics are not all finite only the step count changes.

  The loss and the norm of the gradients are among the metrics, and metrics are the same on every device.
  """

  def guarded(state: TrainState, shared: Any, batch: Any, *, axis_name: str | None) -> tuple[TrainState, Metrics]:
    following, metrics = step(state, shared, batch, axis_name=axis_name)
    finite = jnp.all(jnp.stack([jnp.isfinite(value) for value in metrics.values()]))
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), following, state)
    return kept.replace(step=following.step), metrics

  return guarded
