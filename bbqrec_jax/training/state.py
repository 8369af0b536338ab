"""The state of a training run: one pytree, nothing stored per device."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from bbqrec_jax.ops.randomness import base_key


@flax.struct.dataclass
class CodebookUse:
  """What is known of each codeword's use (see `TokenizerSettings.codebook_shape` for G).

  Attributes:
    usage: [G, L, K] float32, moving average of each code's share of the choices that make semantic IDs.
  """

  usage: jax.Array

  @classmethod
  def create(cls, codebooks: jax.Array) -> "CodebookUse":
    """Of codebooks [G, L, K, d] that are as good as new: all codes in equal use."""
    return cls(jnp.full(codebooks.shape[:-1], 1.0 / codebooks.shape[-2], jnp.float32))


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes.

  Attributes:
    step: int32 scalar, steps taken.
    params: the model's parameters.
    opt_state: the optimiser's.
    key: the run's base random key; a step uses fold_in(key, step), then fold_in of the device's index.
    codes: how the codewords are used (the tokenizer); None elsewhere.
    critic: parameters of the CLUB bound's network (the tokenizer); None elsewhere.
    critic_opt_state: its own optimiser's.
  """

  step: jax.Array
  params: Any
  opt_state: optax.OptState
  key: jax.Array
  codes: CodebookUse | None = None
  critic: Any = None
  critic_opt_state: optax.OptState | None = None

  @classmethod
  def create(
    cls, params: Any, optimizer: optax.GradientTransformation, *, seed: int, codes: CodebookUse | None = None
  ) -> "TrainState":
    """The state before the first step."""
    return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params), base_key(seed), codes)


def step_key(state: TrainState, axis_name: str | None) -> jax.Array:
  """The random key of this step on this device."""
  key = jax.random.fold_in(state.key, state.step)
  return key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))
