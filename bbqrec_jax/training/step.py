"""What the training steps of both stages share: the optimiser's update, and skipping of non-finite steps."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
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


def in_turn(step: StepFunction) -> StepFunction:
  """Several steps as one, of what `side_by_side` gives; the metrics are those of each step, [steps]."""

  def steps(state: TrainState, shared: Any, batches: Any, *, axis_name: str | None) -> tuple[TrainState, Metrics]:
    each = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), batches)
    return jax.lax.scan(lambda state, batch: step(state, shared, batch, axis_name=axis_name), state, each)

  return steps


def side_by_side(batches: Sequence[Any]) -> Any:
  """Batches of equal shapes as one whose leaves are [B, len(batches), ...]: rows first, as partitioners spread them."""
  return jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *batches)


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
