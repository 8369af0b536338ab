"""Discretised similarities between the quantized items of a history, and the attention bias read off them.

    bias[h, i, j] = sum over pairs (m, m') of table[m m', h, bucket(s(i, j))]

For one stream, s is the cosine of the two items' quantized vectors; for two streams it is the mean of the two cross
cosines, which means something only because all streams share one codebook. All of it is computed from [B, T] gathers:
there is no N x N table.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from bbqrec_jax.ops.contrastive import normalize


def stream_pairs(num_streams: int, *, cross: bool = True) -> tuple[tuple[int, int], ...]:
  """The stream pairs that have a table each: every stream with itself, then (if `cross`) every two streams."""
  own = tuple((s, s) for s in range(num_streams))
  return own + (tuple(itertools.combinations(range(num_streams), 2)) if cross else ())


def pair_similarity(vectors: jax.Array, pair: tuple[int, int]) -> jax.Array:
  """Cosine between all positions of each history for one pair of streams.

  Args:
    vectors: [B, T, S, d] unit rows (`normalize`); a zero row is a stream that the item lacks.
    pair: two stream indices; equal ones give the plain cosine, others the mean of the two cross cosines.

  Returns:
    [B, T, T] float32, symmetric.
  """
  first, second = vectors[:, :, pair[0]], vectors[:, :, pair[1]]
  forward = jnp.einsum("btd,bsd->bts", first, second, precision=jax.lax.Precision.HIGHEST)
  return forward if pair[0] == pair[1] else 0.5 * (forward + jnp.swapaxes(forward, 1, 2))


def similarity_buckets(
  vectors: jax.Array, real: jax.Array, edges: jax.Array, *, pairs: tuple[tuple[int, int], ...]
) -> jax.Array:
  """Bucket of each similarity: 0..n-1 by value, n on the diagonal, n + 1 where a position or stream is missing.

  Args:
    vectors: [B, T, S, d] quantized vectors of the history items; an absent stream is a zero row.
    real: [B, T] bool, False at padding.
    edges: [P, n - 1] ascending bucket edges of each pair; a value on an edge belongs to the bucket above it.
    pairs: the P stream pairs.

  Returns:
    [P, B, T, T] int32.
  """
  num_buckets = edges.shape[1] + 1
  here = real[:, :, None] & jnp.any(vectors != 0, axis=-1)
  unit = normalize(vectors)
  diagonal = jnp.eye(vectors.shape[1], dtype=bool)

  def one(pair, edge):
    bucket = jnp.sum(pair_similarity(unit, pair)[..., None] >= edge[None, None, None], axis=-1, dtype=jnp.int32)
    forward = here[:, :, None, pair[0]] & here[:, None, :, pair[1]]
    known = forward & jnp.swapaxes(forward, 1, 2)
    return jnp.where(known, jnp.where(diagonal, num_buckets, bucket), num_buckets + 1)

  return jnp.stack([one(pair, edge) for pair, edge in zip(pairs, edges, strict=True)])


def bucket_bias(tables: jax.Array, buckets: jax.Array) -> jax.Array:
  """Sum over pairs of each head's table entry: tables [P, H, n + 2], buckets [P, B, T, T] -> [B, H, T, T] float32."""
  # A product with one-hot rows, not a gather: its gradient is a matrix product too, where a gather's is a scatter.
  chosen = jax.nn.one_hot(buckets, tables.shape[-1], dtype=tables.dtype)
  return jnp.einsum("pbtsn,phn->bhts", chosen, tables, precision=jax.lax.Precision.HIGHEST)


def equal_frequency_edges(samples: np.ndarray, num_buckets: int) -> np.ndarray:
  """Edges [num_buckets - 1] float32 that split `samples` [n] into buckets as even as ties allow.

  Raises:
    ValueError: if there is no sample.
  """
  if samples.size == 0:
    raise ValueError("no similarity to fit bucket edges on: no history has two items with this pair of streams")
  return np.quantile(samples.astype(np.float64), np.arange(1, num_buckets) / num_buckets).astype(np.float32)
