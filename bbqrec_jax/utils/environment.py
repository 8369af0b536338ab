"""JAX options from the environment: which are overridden, and why."""

import os

import jax
import jax.numpy as jnp

from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.messages import warn

# What decides numbers, or whether anything can be computed at all: a run's config, seed and data decide that alone.
_STATED = {"jax_enable_x64": False, "jax_threefry_partitionable": True, "jax_numpy_dtype_promotion": "standard"}

# Ignored: aids to finding mistakes that end a run which makes none, or make it hundreds of times as slow.
_IGNORED = {
  "jax_debug_infs": (False, "a score of minus infinity stands for no item"),
  "jax_disable_jit": (False, "a step is compiled as a whole"),
  "jax_no_execution": (False, "nothing could be computed"),
  "jax_no_tracing": (False, "nothing could be computed"),
  **dict.fromkeys(
    (f"jax_error_checking_behavior_{what}" for what in ("nan", "divide", "oob")),
    ("ignore", "JAX cannot compile a step with it"),
  ),
  **dict.fromkeys(
    (f"jax_transfer_guard{way}" for way in ("", "_host_to_device", "_device_to_host", "_device_to_device")),
    ("allow", "every step takes a batch from the host to the devices"),
  ),
}

# What may keep JAX from starting its devices.
_OF_DEVICES = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_DEFAULT_DEVICE", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS")


def settle_jax() -> None:
  """Sets what a program of this project needs of JAX, whatever the environment says; before anything is computed.

  Where that takes away what was asked for, one line says so. Everything else is left as it is.
  """
  for name, value in _STATED.items():
    jax.config.update(name, value)
  for name, (value, reason) in _IGNORED.items():
    asked = jax.config.values.get(name)  # Not every version of JAX has all of them.
    if asked not in (value, None):
      warn(f"{name.upper()}={asked} is ignored: {reason}")
      jax.config.update(name, value)


def start_devices() -> None:
  """Starts JAX's devices, if nothing has yet.

  Raises:
    InputError: if there are none of the kind that the environment names, or they cannot multiply as it says.
  """
  try:
    jax.device_put(0)
  except (RuntimeError, AssertionError) as error:  # An assertion fails where "cuda" is named and no plugin is there.
    said = ", ".join(f"{name}={os.environ[name]}" for name in _OF_DEVICES if name in os.environ)
    raise InputError(
      f"JAX cannot start devices here: {str(error) or 'there are none of this kind'} ({said or 'no variable is set'});"
      " name platforms that this machine has, JAX_PLATFORMS=cpu say"
    ) from error
  precision = jax.config.values["jax_default_matmul_precision"]
  if not precision:
    return
  try:
    jax.jit(jnp.dot).lower(*[jax.ShapeDtypeStruct((8, 8), jnp.float32)] * 2)
  except Exception as error:  # Each kind of device has errors of its own.
    raise InputError(
      f"JAX_DEFAULT_MATMUL_PRECISION={precision}: {jax.default_backend()} cannot multiply float32 numbers like this"
      f" ({error}); unset it, or set bfloat16, tensorfloat32 or highest"
    ) from error
