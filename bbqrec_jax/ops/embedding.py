"""Sums of code embeddings, with a custom gradient that is faster on a CPU."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def summed_embedding(table: jax.Array, codes: jax.Array) -> jax.Array:
  """The sum over columns c of table[c, codes[..., c]].

  Its gradient is one segment sum a column: on a CPU twenty times as fast as the gradient of a gather.

  Args:
    table: [C, K, d], of each of C columns of codes.
    codes: [..., C] int in 0..K-1; what is outside of it stands for no code, and adds nothing.

  Returns:
    [..., d].
  """
  total = jnp.zeros((*codes.shape[:-1], table.shape[-1]), table.dtype)
  for column in range(table.shape[0]):
    own = codes[..., column]
    there = (own >= 0) & (own < table.shape[1])
    total = total + jnp.where(there[..., None], table[column][jnp.where(there, own, 0)], jnp.zeros((), table.dtype))
  return total


def _forward(table, codes):
  # A table of no columns holds the shape and type of the gradient.
  return summed_embedding(table, codes), (codes, table[:0])


def _backward(kept, gradient):
  codes, like = kept
  num_codes, width = like.shape[1:]
  flat = gradient.reshape(-1, width).astype(jnp.float32)
  columns = codes.reshape(-1, codes.shape[-1])
  sums = []
  for column in range(codes.shape[-1]):
    own = columns[:, column]
    own = jnp.where(own < 0, num_codes, own)  # A segment sum drops what is past its end.
    sums.append(jax.ops.segment_sum(flat, own, num_segments=num_codes))
  return jnp.stack(sums).astype(like.dtype), None


summed_embedding.defvjp(_forward, _backward)
