"""Residual vector quantization: nearest codes, straight-through gradients, k-means initialisation, revival, statistics.

Distances are float32 whatever the type of the latents, and no [B, K, d] array is ever formed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

_HIGHEST = jax.lax.Precision.HIGHEST


class ResidualQuantization(NamedTuple):
  """What `residual_quantize` found.

  Attributes:
    codes: [B, L] int32, the nearest codeword at each level.
    quantized: [B, d], the sum of the codewords, with no straight-through term.
    residuals: [L, B, d], what each level was given to quantize; the first is the latent itself.
    codewords: [L, B, d], the codeword chosen at each level.
  """

  codes: jax.Array
  quantized: jax.Array
  residuals: jax.Array
  codewords: jax.Array


def code_distances(x: jax.Array, codebook: jax.Array) -> jax.Array:
  """Squared distance of each row to each codeword, less the row's own squared norm.

  The omitted |x|^2 is the same for all codes, so the order is that of the true distances.

  Args:
    x: [B, d].
    codebook: [K, d].

  Returns:
    [B, K] float32.

  Raises:
    ValueError: if the widths differ.
  """
  if x.shape[-1] != codebook.shape[-1]:
    raise ValueError(f"latents and codewords must have one width, got {x.shape} and {codebook.shape}")
  x, codebook = x.astype(jnp.float32), codebook.astype(jnp.float32)
  products = jnp.dot(x, codebook.T, precision=_HIGHEST)
  return jnp.sum(jnp.square(codebook), axis=-1)[None] - 2.0 * products


def nearest_code(x: jax.Array, codebook: jax.Array) -> jax.Array:
  """Index of the nearest codeword of each row: [B, d], [K, d] -> [B] int32; the lowest index wins a tie."""
  return jnp.argmin(code_distances(x, codebook), axis=-1).astype(jnp.int32)


def straight_through(z: jax.Array, quantized: jax.Array) -> jax.Array:
  """The value of `quantized` with the gradient of `z` (Bengio et al., 2013): z + stop_gradient(quantized - z)."""
  return z + jax.lax.stop_gradient(quantized - z)


def residual_quantize(z: jax.Array, codebooks: jax.Array) -> ResidualQuantization:
  """Quantizes each row level by level, each level taking what the levels before it left over.

  The residual passes on no gradient to the codewords of earlier levels: each codeword is moved by its own level's loss
  alone, as in RQ-VAE (Lee et al., 2022) and TIGER (Rajput et al., 2023).

  Args:
    z: [B, d] latents.
    codebooks: [L, K, d].

  Returns:
    A `ResidualQuantization`.

  Raises:
    ValueError: if `codebooks` is not of rank 3 or the widths differ.
  """
  if codebooks.ndim != 3:
    raise ValueError(f"codebooks must be [levels, codes, width], got shape {codebooks.shape}")
  residual, residuals, codewords, codes = z, [], [], []
  for codebook in codebooks:
    code = nearest_code(residual, codebook)
    codeword = codebook[code]
    residuals.append(residual)
    codewords.append(codeword)
    codes.append(code)
    residual = residual - jax.lax.stop_gradient(codeword)
  return ResidualQuantization(
    codes=jnp.stack(codes, axis=-1),
    quantized=sum(codewords[1:], start=codewords[0]),
    residuals=jnp.stack(residuals),
    codewords=jnp.stack(codewords),
  )


def quantization_error(result: ResidualQuantization, *, commitment: float = 0.25) -> jax.Array:
  """|sg(r) - e|^2 + commitment |r - sg(e)|^2, averaged over levels (RQ-VAE).

  Args:
    result: a residual quantization of B rows.
    commitment: the weight beta that pulls latents to their codewords.

  Returns:
    [B] float32, one value a row; the squared norms are sums over the width.
  """
  residuals, codewords = result.residuals.astype(jnp.float32), result.codewords.astype(jnp.float32)
  codebook_term = jnp.sum(jnp.square(jax.lax.stop_gradient(residuals) - codewords), axis=-1)
  commitment_term = jnp.sum(jnp.square(residuals - jax.lax.stop_gradient(codewords)), axis=-1)
  return jnp.mean(codebook_term + commitment * commitment_term, axis=0)


def decode(codes: jax.Array, codebooks: jax.Array) -> jax.Array:
  """Sum of the codewords that `codes` name: [..., L], [L, K, d] -> [..., d]."""
  return sum(codebooks[level][codes[..., level]] for level in range(codebooks.shape[0]))  # type: ignore[return-value]


def code_counts(codes: jax.Array, num_codes: int, *, valid: jax.Array | None = None) -> jax.Array:
  """How often each code occurs at each level: codes [B, L], valid [B] -> [L, K] float32."""
  batch, levels = codes.shape
  weight = jnp.ones(batch, jnp.float32) if valid is None else valid.astype(jnp.float32)
  index = codes + num_codes * jnp.arange(levels)[None]
  flat = jnp.zeros(levels * num_codes, jnp.float32).at[index].add(weight[:, None])
  return flat.reshape(levels, num_codes)


def perplexity(counts: jax.Array) -> jax.Array:
  """Exponential of the entropy of code use: [..., K] -> [...]; K when all are used alike, 1 when one code is."""
  share = counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1e-12)
  return jnp.exp(-jnp.sum(share * jnp.log(jnp.maximum(share, 1e-12)), axis=-1))


def revive_codes(
  key: jax.Array, codebook: jax.Array, idle: jax.Array, residuals: jax.Array, valid: jax.Array, patience: int
) -> tuple[jax.Array, jax.Array]:
  """Moves the codewords of one level that nothing chose for `patience` steps to randomly drawn live residuals.

  Args:
    key: random key, the same on every device.
    codebook: [K, d].
    idle: [K] int32, the steps since each code was last chosen.
    residuals: [B, d] what this level was given in this step (on every device: all of them).
    valid: [B] bool, the rows that may be drawn.
    patience: a code idle for more steps than this is moved.

  Returns:
    The codebook, and `idle` with the moved codes back at 0. Nothing moves where no row is valid.
  """
  # A random order with the valid rows first: two dead codes take two rows, while there are as many.
  order = jnp.argsort(jnp.where(valid, jax.random.uniform(key, valid.shape), 2.0))
  dead = (idle > patience) & jnp.any(valid)
  rows = order[(jnp.cumsum(dead) - 1) % jnp.maximum(jnp.sum(valid), 1)]
  codebook = jnp.where(dead[:, None], residuals[rows].astype(codebook.dtype), codebook)
  return codebook, jnp.where(dead, 0, idle)


def _plus_plus_seeds(key: jax.Array, points: jax.Array, weights: jax.Array, num_codes: int) -> jax.Array:
  """k-means++ seeding (Arthur & Vassilvitskii, 2007): each seed drawn in proportion to weight x squared distance."""
  first_key, key = jax.random.split(key)
  log_weights = jnp.log(weights)
  first = jax.random.categorical(first_key, log_weights)
  seeds = jnp.zeros((num_codes, points.shape[1]), jnp.float32).at[0].set(points[first])
  distance = jnp.sum(jnp.square(points - points[first][None]), axis=-1)

  def add(index, carry):
    seeds, distance = carry
    # Fewer distinct points than codes: every distance is 0, and a plain weighted draw repeats a point.
    logits = jnp.where(jnp.any((distance > 0) & (weights > 0)), jnp.log(distance), 0.0) + log_weights
    chosen = points[jax.random.categorical(jax.random.fold_in(key, index), logits)]
    return seeds.at[index].set(chosen), jnp.minimum(distance, jnp.sum(jnp.square(points - chosen[None]), axis=-1))

  seeds, _ = jax.lax.fori_loop(1, num_codes, add, (seeds, distance))
  return seeds


@functools.partial(jax.jit, static_argnames=("num_codes", "iterations", "block"))
def kmeans(
  key: jax.Array,
  points: jax.Array,
  *,
  num_codes: int,
  weights: jax.Array | None = None,
  iterations: int = 20,
  block: int = 16384,
) -> tuple[jax.Array, jax.Array]:
  """Lloyd's k-means from k-means++ seeds; an emptied cluster takes the point farthest from its own centre.

  Args:
    key: random key.
    points: [N, d].
    num_codes: K.
    weights: [N] float >= 0, or None for all alike; rows of weight 0 take no part.
    iterations: Lloyd steps after the seeding.
    block: rows whose distances are held at once; memory is block x K, not N x K.

  Returns:
    (centres [K, d] float32, codes [N] int32).
  """
  points = points.astype(jnp.float32)
  weights = jnp.ones(points.shape[0], jnp.float32) if weights is None else weights.astype(jnp.float32)
  points = jnp.where(weights[:, None] > 0, points, 0.0)  # What takes no part may be NaN.
  live = jnp.maximum(jnp.sum(weights > 0), 1)

  def assign(centres):
    def one(x):
      distances = code_distances(x[None], centres)[0]
      code = jnp.argmin(distances)
      return code.astype(jnp.int32), distances[code] + jnp.sum(jnp.square(x))

    return jax.lax.map(one, points, batch_size=min(block, points.shape[0]))

  def step(_, centres):
    codes, distance = assign(centres)
    mass = jax.ops.segment_sum(weights, codes, num_codes)
    means = jax.ops.segment_sum(points * weights[:, None], codes, num_codes) / jnp.maximum(mass, 1e-12)[:, None]
    # The e-th empty cluster takes the e-th farthest point, so that no two of them take the same one.
    _, farthest = jax.lax.top_k(jnp.where(weights > 0, distance, -jnp.inf), min(num_codes, points.shape[0]))
    empty = mass <= 0
    turn = jnp.minimum(jnp.cumsum(empty) - 1, jnp.minimum(live, farthest.shape[0]) - 1)
    return jnp.where(empty[:, None], points[farthest[turn]], means)

  centres = jax.lax.fori_loop(0, iterations, step, _plus_plus_seeds(key, points, weights, num_codes))
  return centres, assign(centres)[0]


def residual_kmeans(
  key: jax.Array,
  points: jax.Array,
  *,
  num_levels: int,
  num_codes: int,
  weights: jax.Array | None = None,
  iterations: int = 20,
) -> jax.Array:
  """Codebooks [L, K, d] by k-means on the points, then on what it leaves over, and so on.

  The mean squared residual does not rise from one level to the next.
  """
  residual, levels = points.astype(jnp.float32), []
  for level in range(num_levels):
    centres, codes = kmeans(
      jax.random.fold_in(key, level), residual, num_codes=num_codes, weights=weights, iterations=iterations
    )
    residual = residual - centres[codes]
    levels.append(centres)
  return jnp.stack(levels)
