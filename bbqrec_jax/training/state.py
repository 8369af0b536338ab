"""The state of a training run: one pytree, nothing stored per device."""

from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import optax

from bbqrec_jax.ops.randomness import base_key


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes, in both stages.

  Attributes:
    step: int32 scalar, steps taken.
    params: the model's parameters.
    opt_state: the optimiser's.
    key: the run's base random key; a step uses fold_in(key, step), then fold_in of the device's index.
  """

  step: jax.Array
  params: Any
  opt_state: optax.OptState
  key: jax.Array

  @classmethod
  def create(cls, params: Any, optimizer: optax.GradientTransformation, *, seed: int, **more: Any) -> Self:
    """The state before the first step; `more` are the fields that a stage adds."""
    return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params), base_key(seed), **more)


def step_key(state: TrainState, axis_name: str | None) -> jax.Array:
  """The random key of this step on this device."""
  key = jax.random.fold_in(state.key, state.step)
  return key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))
