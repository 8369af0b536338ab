"""Residual vector quantization and finite scalar quantization: codes, and gradients that pass through them.

Distances are float32 whatever the type of the latents, and no [B, K, d] array is ever formed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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


def code_distances(x: jax.Array, codebook: jax.Array, *, codes_first: bool = False) -> jax.Array:
  """Squared distance of each row to each codeword, less the row's own squared norm.

  The omitted |x|^2 is the same for all codes, so the order is that of the true distances.

  Args:
    x: [B, d].
    codebook: [K, d].
    codes_first: whether the result is transposed.

  Returns:
    [B, K] float32, or [K, B].

  Raises:
    ValueError: if the widths differ.
  """
  if x.shape[-1] != codebook.shape[-1]:
    raise ValueError(f"latents and codewords must have one width, got {x.shape} and {codebook.shape}")
  x, codebook = x.astype(jnp.float32), codebook.astype(jnp.float32)
  norms = jnp.sum(jnp.square(codebook), axis=-1)
  if codes_first:
    return norms[:, None] - 2.0 * jnp.dot(codebook, x.T, precision=_HIGHEST)
  return norms[None] - 2.0 * jnp.dot(x, codebook.T, precision=_HIGHEST)


def nearest_code(x: jax.Array, codebook: jax.Array) -> jax.Array:
  """Index of the nearest codeword of each row: [B, d], [K, d] -> [B] int32; the lowest index wins a tie."""
  # Distances [K, B] and two plain minima: on a CPU more than twice as fast as an argmin along the rows of [B, K].
  distances = code_distances(x, codebook, codes_first=True)
  farther = distances > jnp.min(distances, axis=0, keepdims=True)
  index = jax.lax.broadcasted_iota(jnp.int32, distances.shape, 0)
  return jnp.min(jnp.where(farther, len(codebook) - 1, index), axis=0)


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
    [B] float32, one value per row; the squared norms are sums over the width.
  """
  residuals, codewords = result.residuals.astype(jnp.float32), result.codewords.astype(jnp.float32)
  error = commitment * jnp.sum(jnp.square(residuals - jax.lax.stop_gradient(codewords)), axis=-1)
  error += jnp.sum(jnp.square(jax.lax.stop_gradient(residuals) - codewords), axis=-1)
  return jnp.mean(error, axis=0)


def decode(codes: jax.Array, codebooks: jax.Array) -> jax.Array:
  """Sum of the codewords that `codes` name: [..., L], [L, K, d] -> [..., d]."""
  return sum(codebooks[level][codes[..., level]] for level in range(codebooks.shape[0]))  # type: ignore[return-value]


def channel_levels(num_codes: int, channels: int) -> tuple[int, ...]:
  """How many values each channel of a finite scalar quantizer has: as alike as can be, with the product `num_codes`."""
  levels, factor = [1] * channels, 2
  primes = []
  while num_codes > 1:
    while num_codes % factor == 0:
      primes.append(factor)
      num_codes //= factor
    factor = factor + 1 if factor * factor <= num_codes else max(num_codes, factor + 1)
  for prime in reversed(primes):
    levels[levels.index(min(levels))] *= prime
  return tuple(levels)


def finite_code(z: jax.Array, levels: tuple[int, ...]) -> jax.Array:
  """The code of each row: every channel is rounded to one of n values between -1 and 1, (2 i + 1) / n - 1.

  Args:
    z: [B, c], each channel between -1 and 1.
    levels: n of each channel.

  Returns:
    [B] int32, the i of the channels as the digits of one number, the first channel's the lowest.
  """
  code, base = jnp.zeros(z.shape[:-1], jnp.int32), 1
  for channel, number in enumerate(levels):
    digit = jnp.floor((z[..., channel].astype(jnp.float32) + 1.0) * (0.5 * number)).astype(jnp.int32)
    code, base = code + base * jnp.clip(digit, 0, number - 1), base * number
  return code


def finite_codebook(levels: tuple[int, ...]) -> np.ndarray:
  """What each code of `finite_code` stands for, [product of levels, c] float32."""
  codes, columns = np.arange(int(np.prod(levels))), []
  for number in levels:
    columns.append((2.0 * (codes % number) + 1.0) / number - 1.0)
    codes = codes // number
  return np.stack(columns, axis=-1).astype(np.float32)
