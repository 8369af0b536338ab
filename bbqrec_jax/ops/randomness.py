"""Where random numbers begin."""

import jax
import jax.numpy as jnp


def base_key(seed: int) -> jax.Array:
  """The key that `jax.random.key` makes of a seed from 0 to 2^32 - 1, unless the process is told to make another.

  Its generator and its bits are stated here: a process may have another default generator, or an offset to every seed.
  """
  return jax.random.wrap_key_data(jnp.array([0, seed], jnp.uint32), impl="threefry2x32")
