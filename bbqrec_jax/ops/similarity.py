"""Discretised similarities between the quantized items of a history, and the attention bias read off them.

    bias[h, i, j] = sum over pairs (m, m') of table[m m', h, bucket(s(i, j))]

For one stream, s is the cosine of the two items' quantized vectors, or how many codes their IDs share from the first;
for two streams it is the mean of the two cross similarities, which mean something only because all streams share one
codebook. All of it is computed from [B, T] gathers: there is no N x N table.
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


def pair_overlap(codes: jax.Array, pair: tuple[int, int]) -> jax.Array:
  """How many codes two items share from the first on, between all positions of each history.

  Args:
    codes: [B, T, S, L] int.
    pair: two stream indices; equal ones give the plain count, others the mean of the two cross counts.

  Returns:
    [B, T, T] float32 in 0..L, symmetric.
  """
  first, second = codes[:, :, None, pair[0]], codes[:, None, :, pair[1]]
  forward = jnp.sum(jnp.cumprod((first == second).astype(jnp.int32), axis=-1), axis=-1).astype(jnp.float32)
  return forward if pair[0] == pair[1] else 0.5 * (forward + jnp.swapaxes(forward, 1, 2))


def similarities(
  streams: jax.Array, real: jax.Array, *, pairs: tuple[tuple[int, int], ...]
) -> tuple[jax.Array, jax.Array]:
  """Similarity of every two positions of each history, for every pair of streams.

  Args:
    streams: [B, T, S, d] float, quantized vectors of the history items, an absent stream a zero row: cosines; or
      [B, T, S, L] int, their codes, an absent stream -1: shared prefixes.
    real: [B, T] bool, False at padding.
    pairs: the P stream pairs.

  Returns:
    values [P, B, T, T] float32, and known [P, B, T, T] bool, False where a position or a stream is missing.
  """
  overlap = jnp.issubdtype(streams.dtype, jnp.integer)
  present = jnp.all(streams >= 0, axis=-1) if overlap else jnp.any(streams != 0, axis=-1)
  streams = streams if overlap else normalize(streams)
  here = real[:, :, None] & present
  values, known = [], []
  for pair in pairs:
    forward = here[:, :, None, pair[0]] & here[:, None, :, pair[1]]
    values.append(pair_overlap(streams, pair) if overlap else pair_similarity(streams, pair))
    known.append(forward & jnp.swapaxes(forward, 1, 2))
  return jnp.stack(values), jnp.stack(known)


def similarity_buckets(
  streams: jax.Array, real: jax.Array, edges: jax.Array, *, pairs: tuple[tuple[int, int], ...]
) -> jax.Array:
  """Bucket of each similarity: 0..n-1 by value, n on the diagonal, n + 1 where a position or stream is missing.

  Args:
    streams: see `similarities`.
    real: [B, T] bool, False at padding.
    edges: [P, n - 1] ascending bucket edges of each pair; a value on an edge belongs to the bucket above it.
    pairs: the P stream pairs.

  Returns:
    [P, B, T, T] int32.
  """
  values, known = similarities(streams, real, pairs=pairs)
  num_buckets = edges.shape[1] + 1
  diagonal = jnp.eye(real.shape[1], dtype=bool)

  def one(value, known, edge):
    bucket = jnp.sum(value[..., None] >= edge[None, None, None], axis=-1, dtype=jnp.int32)
    return jnp.where(known, jnp.where(diagonal, num_buckets, bucket), num_buckets + 1)

  return jnp.stack([one(*parts) for parts in zip(values, known, edges, strict=True)])


def continuous_bias(
  tables: jax.Array, streams: jax.Array, real: jax.Array, *, pairs: tuple[tuple[int, int], ...]
) -> jax.Array:
  """The bias without buckets, for the ablation: a slope times the similarity.

  Args:
    tables: [P, H, 3]: the slope, the bias on the diagonal, and the bias where a position or stream is missing.
    streams: see `similarities`.
    real: [B, T] bool, False at padding.
    pairs: the P stream pairs.

  Returns:
    [B, H, T, T] float32.
  """
  values, known = similarities(streams, real, pairs=pairs)
  diagonal = jnp.broadcast_to(jnp.eye(real.shape[1], dtype=bool)[None, None], known.shape)
  parts = (jnp.where(known & ~diagonal, values, 0.0), known & diagonal, ~known)
  stacked = jnp.stack([part.astype(jnp.float32) for part in parts], axis=-1)
  return jnp.einsum("pbtsn,phn->bhts", stacked, tables, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def bucket_bias(tables: jax.Array, buckets: jax.Array) -> jax.Array:
  """Sum over pairs of each head's table entry: tables [P, H, n + 2], buckets [P, B, T, T] -> [B, H, T, T] float32.

  Read and learned in the way that is fast where it runs: a TPU multiplies by one-hot rows, a CPU reads and adds entries
  one by one, a GPU reads them and multiplies for the gradient.
  """

  def read(tables, buckets):
    pairs, heads, _ = tables.shape
    return sum(
      (jnp.stack([tables[pair, head][buckets[pair]] for head in range(heads)], axis=1) for pair in range(pairs)),
      start=jnp.zeros((), tables.dtype),
    )

  def multiply(tables, buckets):
    chosen = jax.nn.one_hot(buckets, tables.shape[-1], dtype=tables.dtype)
    return jnp.einsum("pbtsn,phn->bhts", chosen, tables, precision=jax.lax.Precision.HIGHEST)

  return jax.lax.platform_dependent(tables, buckets, tpu=multiply, default=read)


def _bucket_bias_forward(tables: jax.Array, buckets: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return bucket_bias(tables, buckets), (tables, buckets)


def _bucket_bias_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None]:
  tables, buckets = saved
  _, heads, width = tables.shape

  def add(buckets, gradient):
    each = jnp.moveaxis(gradient, 1, -1).reshape(-1, heads)
    return jnp.stack([jax.ops.segment_sum(each, bucket.reshape(-1), width).T for bucket in buckets])

  def multiply(buckets, gradient):
    chosen = jax.nn.one_hot(buckets, width, dtype=gradient.dtype)
    return jnp.einsum("pbtsn,bhts->phn", chosen, gradient, precision=jax.lax.Precision.HIGHEST)

  return jax.lax.platform_dependent(buckets, gradient, cpu=add, default=multiply), None


bucket_bias.defvjp(_bucket_bias_forward, _bucket_bias_backward)


# What a cosine may differ by from one program to the next: an edge at 1 would part equal items by it.
_ROUNDING = 5e-6


def equal_frequency_edges(samples: np.ndarray, num_buckets: int) -> np.ndarray:
  """Edges [num_buckets - 1] float32 that split `samples` [n] into buckets as even as ties allow.

  An edge stands a little below its quantile, so that equal items are in one bucket whatever the rounding.

  Raises:
    ValueError: if there is no sample.
  """
  if samples.size == 0:
    raise ValueError("no similarity to fit bucket edges on: no history has two items with this pair of streams")
  quantiles = np.quantile(samples.astype(np.float64), np.arange(1, num_buckets) / num_buckets)
  return (quantiles - _ROUNDING).astype(np.float32)


def overlap_edges(num_levels: int) -> np.ndarray:
  """Edges [2 L] float32 that give each half of a shared code a bucket of its own: 0, 1/2, 1, up to L."""
  return (np.arange(2 * num_levels) / 2 + 0.25).astype(np.float32)
