"""Masked means whose value and gradient do not depend on how many devices share the batch."""

import jax
import jax.numpy as jnp


def global_sum(value: jax.Array, axis_name: str | None) -> jax.Array:
  """Sum of `value` over the devices of `axis_name`, or `value` itself on one device."""
  return value if axis_name is None else jax.lax.psum(value, axis_name)


def masked_mean(values: jax.Array, valid: jax.Array, *, axis_name: str | None = None) -> jax.Array:
  """Mean of `values` where `valid`; over several devices, this device's share of the global mean.

  The share is the local sum over the *global* count. Summing shares over devices (and so summing their gradients) gives
  the mean over the global batch, however unevenly its valid entries are spread.

  Args:
    values: [...] float.
    valid: [...] bool, the same shape.
    axis_name: the mapped axis over which the batch is split, or None.

  Returns:
    A float32 scalar; 0 where nothing is valid on any device.

  Raises:
    ValueError: if the two shapes differ.
  """
  if values.shape != valid.shape:
    raise ValueError(f"values and valid must have one shape, got {values.shape} and {valid.shape}")
  # where, not a product: an invalid entry may be NaN and must not leak into the sum or its gradient.
  total = jnp.sum(jnp.where(valid, values.astype(jnp.float32), 0.0))
  return total / _count(valid, axis_name)


def mean_weights(valid: jax.Array, *, axis_name: str | None = None) -> jax.Array:
  """What the entries of `masked_mean` weigh: [...] bool -> [...] float32, 0 where not valid."""
  return valid.astype(jnp.float32) / _count(valid, axis_name)


def _count(valid: jax.Array, axis_name: str | None) -> jax.Array:
  """How many are valid on all devices, at least 1."""
  count = global_sum(jnp.sum(valid.astype(jnp.float32)), axis_name)
  return jnp.maximum(jax.lax.stop_gradient(count), 1.0)
