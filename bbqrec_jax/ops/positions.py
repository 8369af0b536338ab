"""Buckets of relative positions and of elapsed times."""

import math

import jax
import jax.numpy as jnp


def relative_buckets(
  distance: jax.Array, *, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> jax.Array:
  """Buckets of key place less query place, fine near zero and coarse far away, as T5's (Raffel et al., 2020).

  Half of the buckets of a direction are one distance each; the others grow with the logarithm of the distance up to
  `max_distance`, and everything beyond shares the last.

  Args:
    distance: [...] int, place of the key less place of the query.
    num_buckets: n; even, and at least 4 (2 with one direction).
    max_distance: where the last bucket begins to take all.
    bidirectional: whether keys after the query have buckets of their own, the upper half; otherwise they count as at 0.

  Returns:
    [...] int32 in 0..n-1.

  Raises:
    ValueError: if a direction has no bucket of one distance, or none for what is further.
  """
  of_each = num_buckets // 2 if bidirectional else num_buckets
  if not 1 <= of_each // 2 < max_distance or (bidirectional and num_buckets % 2):
    directions = "both directions" if bidirectional else "one direction"
    raise ValueError(
      f"distances up to {max_distance} need 2 to {2 * max_distance - 1} buckets a direction, got {num_buckets} for"
      f" {directions}"
    )
  if bidirectional:
    num_buckets //= 2
    first = jnp.where(distance > 0, num_buckets, 0)
    distance = jnp.abs(distance)
  else:
    first = jnp.zeros_like(distance)
    distance = jnp.maximum(-distance, 0)
  exact = num_buckets // 2
  scale = (num_buckets - exact) / math.log(max_distance / exact)
  # The maximum keeps the logarithm of distances that have a bucket of their own finite.
  far = exact + (jnp.log(jnp.maximum(distance, exact).astype(jnp.float32) / exact) * scale).astype(jnp.int32)
  return (first + jnp.where(distance < exact, distance, jnp.minimum(far, num_buckets - 1))).astype(jnp.int32)


def elapsed_buckets(seconds: jax.Array, *, num_buckets: int = 32) -> jax.Array:
  """Buckets of the time between two interactions, each twice as wide as the one before it.

  Args:
    seconds: [...] int; negative ones count as 0.
    num_buckets: n; 32 tell apart up to 68 years.

  Returns:
    [...] int32 in 0..n-1: 0 for no time at all, else the position of the highest bit.
  """
  bits = 32 - jax.lax.clz(jnp.maximum(seconds, 0).astype(jnp.int32))
  return jnp.minimum(bits, num_buckets - 1)


def last_places(segments: jax.Array) -> jax.Array:
  """Where the last item of each row of one history stands: [B, T], 0 at padding, -> [B] int32; 0 of an empty row."""
  return jnp.maximum(jnp.sum(segments > 0, axis=1, dtype=jnp.int32) - 1, 0)
