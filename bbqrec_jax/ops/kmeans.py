"""Residual k-means over any number of points, in memory or memory-mapped, with one block on the device at a time."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from bbqrec_jax.ops.quantize import code_distances, residual_quantize
from bbqrec_jax.ops.randomness import base_key


@functools.partial(jax.jit, static_argnames="num_codes")
def _plus_plus_seeds(key: jax.Array, points: jax.Array, weights: jax.Array, *, num_codes: int) -> jax.Array:
  """k-means++ seeding (Arthur & Vassilvitskii, 2007): each seed drawn in proportion to weight x squared distance."""
  first_key, key = jax.random.split(key)
  log_weights = jnp.log(weights)
  first = jax.random.categorical(first_key, log_weights, mode="low")
  seeds = jnp.zeros((num_codes, points.shape[1]), jnp.float32).at[0].set(points[first])
  distance = jnp.sum(jnp.square(points - points[first][None]), axis=-1)

  def add(index, carry):
    seeds, distance = carry
    # Fewer distinct points than codes: every distance is 0, and a plain weighted draw repeats a point.
    logits = jnp.where(jnp.any((distance > 0) & (weights > 0)), jnp.log(distance), 0.0) + log_weights
    chosen = points[jax.random.categorical(jax.random.fold_in(key, index), logits, mode="low")]
    return seeds.at[index].set(chosen), jnp.minimum(distance, jnp.sum(jnp.square(points - chosen[None]), axis=-1))

  seeds, _ = jax.lax.fori_loop(1, num_codes, add, (seeds, distance))
  return seeds


@jax.jit
def _residuals(points: jax.Array, codebooks: jax.Array | None) -> jax.Array:
  """What the levels before leave over: [B, d], [l, K, d] or None -> [B, d] float32."""
  points = points.astype(jnp.float32)
  return points if codebooks is None else points - residual_quantize(points, codebooks).quantized


@jax.jit
def _accumulate(points, weights, codebooks, centres):
  """(mass [K], sums [K, d], the farthest points of the block and their squared distances)."""
  x = _residuals(points, codebooks)
  distances = code_distances(x, centres)
  codes = jnp.argmin(distances, axis=-1).astype(jnp.int32)
  nearest = jnp.take_along_axis(distances, codes[:, None], axis=-1)[:, 0] + jnp.sum(jnp.square(x), axis=-1)
  mass = jax.ops.segment_sum(weights, codes, len(centres))
  sums = jax.ops.segment_sum(x * weights[:, None], codes, len(centres))
  far, index = jax.lax.top_k(jnp.where(weights > 0, nearest, -jnp.inf), min(len(centres), len(x)))
  return mass, sums, x[index], far


def residual_kmeans(
  seed: int,
  points: np.ndarray,
  *,
  num_levels: int,
  num_codes: int,
  weights: np.ndarray | None = None,
  iterations: int = 20,
  sample: int = 65536,
  block: int = 16384,
) -> np.ndarray:
  """Lloyd's k-means on the points, then on what it leaves over, and so on for each level.

  Seeded by k-means++ on a sample, then `iterations` passes over all points, a block at a time. An emptied cluster takes
  the point that is farthest from its own centre. The mean squared residual does not rise from one level to the next.

  Args:
    seed: of the sample and of the seeding.
    points: [N, d], an array or a memory map of any float type.
    num_levels: L.
    num_codes: K.
    weights: [N] float >= 0, or None for all alike; rows of weight 0 take no part, and may be NaN.
    iterations: Lloyd passes per level.
    sample: points at most that the seeds are drawn from.
    block: points on the device at once; memory is block x (d + K), whatever N is.

  Returns:
    Codebooks [L, K, d] float32.

  Raises:
    ValueError: if no point has a weight.
  """
  weights = np.ones(len(points), np.float32) if weights is None else np.asarray(weights, np.float32)
  live = np.flatnonzero(weights > 0)
  if not len(live):
    raise ValueError("k-means needs at least one point with a weight above 0")
  block = min(block, len(points))
  chosen = live
  if len(live) > sample:
    chosen = np.sort(np.random.default_rng(seed).choice(live, sample, replace=False))
  seeds_from, seed_weights = jnp.asarray(points[chosen], jnp.float32), jnp.asarray(weights[chosen], jnp.float32)

  def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for first in range(0, len(points), block):
      # The last block reaches back, so that all have one shape; what was seen before has no weight there.
      start = min(first, len(points) - block)
      rows = slice(start, start + block)
      weight = np.where(np.arange(start, start + block) >= first, weights[rows], np.float32(0))
      yield np.where(weight[:, None] > 0, points[rows], 0).astype(np.float32), weight

  codebooks = None
  for level in range(num_levels):
    key = jax.random.fold_in(base_key(seed), level)
    centres = _plus_plus_seeds(key, _residuals(seeds_from, codebooks), seed_weights, num_codes=num_codes)
    for _ in range(iterations):
      centres = _lloyd(blocks(), codebooks, centres, live=len(live))
    codebooks = centres[None] if codebooks is None else jnp.concatenate([codebooks, centres[None]])
  return np.asarray(codebooks)


def _lloyd(blocks, codebooks, centres, *, live):
  """One pass: the mean of each cluster; the e-th empty cluster takes the e-th farthest of all points."""
  num_codes = len(centres)
  mass, sums = jnp.zeros(num_codes, jnp.float32), jnp.zeros_like(centres)
  farthest, far = jnp.zeros((0, centres.shape[1]), jnp.float32), jnp.zeros(0, jnp.float32)
  for points, weights in blocks:
    block_mass, block_sums, block_farthest, block_far = _accumulate(points, weights, codebooks, centres)
    mass, sums = mass + block_mass, sums + block_sums
    far, index = jax.lax.top_k(jnp.concatenate([far, block_far]), min(num_codes, len(far) + len(block_far)))
    farthest = jnp.concatenate([farthest, block_farthest])[index]
  empty = mass <= 0
  turn = jnp.minimum(jnp.cumsum(empty, dtype=jnp.int32) - 1, min(live, len(far)) - 1)
  return jnp.where(empty[:, None], farthest[turn], sums / jnp.maximum(mass, 1e-12)[:, None])
