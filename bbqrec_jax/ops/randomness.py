"""The base random key of a run."""

import jax
import jax.numpy as jnp


def base_key(seed: int) -> jax.Array:
  """The key that `jax.random.key` makes of a seed from 0 to 2^32 - 1 by default.

  Its generator and bits are explicit, because JAX options can choose another generator or offset every seed.
  """
  return jax.random.wrap_key_data(jnp.array([0, seed], jnp.uint32), impl="threefry2x32")
