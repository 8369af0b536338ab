"""Residual vector quantization: nearest or balanced codes, and gradients that pass through them.

Distances are float32 whatever the type of the latents, and no [B, K, d] array is ever formed.
"""

from collections.abc import Callable
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


def balanced_code(
  x: jax.Array,
  codebook: jax.Array,
  *,
  valid: jax.Array | None = None,
  epsilon: float = 0.05,
  iterations: int = 50,
  axis_name: str | None = None,
) -> jax.Array:
  """A near code for each row such that all codes are chosen about alike, by Sinkhorn iterations (Cuturi, 2013).

  The codes are those of the entropic optimal transport from the rows of the global batch to the codewords, each
  codeword taking the same mass; as for the last level of LC-Rec (Zheng et al., 2024).

  Args:
    x: [B, d].
    codebook: [K, d].
    valid: [B] bool; an invalid row gets a code, and takes no part in the balance. None: all are valid.
    epsilon: of the entropy, in units of the largest distance less the smallest; smaller is nearer to the hard optimum.
    iterations: of the scaling of columns and rows.
    axis_name: the mapped axis over which the batch is split, or None.

  Returns:
    [B] int32.
  """
  x, codebook = jax.lax.stop_gradient((x, codebook))
  distances = code_distances(x, codebook) + jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
  here = jnp.ones(x.shape[0], bool) if valid is None else valid

  def over_devices(value, reduce):
    return value if axis_name is None else reduce(value, axis_name)

  largest = over_devices(jnp.max(jnp.where(here[:, None], distances, -jnp.inf)), jax.lax.pmax)
  smallest = over_devices(jnp.min(jnp.where(here[:, None], distances, jnp.inf)), jax.lax.pmin)
  scores = -(distances - smallest) / (jnp.maximum(largest - smallest, 1e-12) * epsilon)
  scores = jnp.where(here[:, None], scores, 0.0)

  def iterate(_, potential):
    # Rows first: each valid row's mass is 1 after it, so that a codeword's share is the sum over rows.
    share = jax.nn.softmax(scores + potential[None], axis=-1)
    mass = over_devices(jnp.sum(jnp.where(here[:, None], share, 0.0), axis=0), jax.lax.psum)
    return potential - jnp.log(jnp.maximum(mass, 1e-30))

  potential = jax.lax.fori_loop(0, iterations, iterate, jnp.zeros(codebook.shape[0], jnp.float32))
  return jnp.argmax(scores + potential[None], axis=-1).astype(jnp.int32)


def straight_through(z: jax.Array, quantized: jax.Array) -> jax.Array:
  """The value of `quantized` with the gradient of `z` (Bengio et al., 2013): z + stop_gradient(quantized - z)."""
  return z + jax.lax.stop_gradient(quantized - z)


def rotation_trick(z: jax.Array, quantized: jax.Array) -> jax.Array:
  """The value of `quantized`, a gradient turned and scaled as the latent is on its way to it (Fifty et al., 2025).

  `quantized` = scale x R z with R the rotation in the plane of the two; R and the scale carry no gradient, so the angle
  between gradient and latent is kept on the way back. Where one of the two is zero it is `straight_through`.

  Args:
    z: [B, d] latents.
    quantized: [B, d].

  Returns:
    [B, d] of z's dtype.
  """
  fixed = jax.lax.stop_gradient
  z32, q32 = z.astype(jnp.float32), fixed(quantized.astype(jnp.float32))
  lengths = [jnp.linalg.norm(fixed(x), axis=-1, keepdims=True) for x in (z32, q32)]
  turns = (lengths[0] > 1e-6) & (lengths[1] > 1e-6)
  u, v = (jnp.where(turns, fixed(x) / jnp.maximum(n, 1e-6), 0.0) for x, n in zip((z32, q32), lengths, strict=True))
  middle = u + v
  norm = jnp.linalg.norm(middle, axis=-1, keepdims=True)
  # Opposite directions have no one rotation between them.
  turns &= norm > 1e-6
  middle = middle / jnp.maximum(norm, 1e-6)
  along = jnp.sum(middle * z32, axis=-1, keepdims=True)
  rotated = z32 - 2.0 * along * middle + 2.0 * jnp.sum(u * z32, axis=-1, keepdims=True) * v
  rotated = rotated * jnp.where(turns, lengths[1] / jnp.maximum(lengths[0], 1e-6), 1.0)
  # The value exactly, whatever rounding the rotation brings.
  rotated = rotated + fixed(q32 - rotated)
  return jnp.where(turns, rotated, straight_through(z32, q32)).astype(z.dtype)


GRADIENTS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  "straight_through": straight_through,
  "rotation": rotation_trick,
}


def residual_quantize(
  z: jax.Array, codebooks: jax.Array, *, choose_last: Callable[[jax.Array, jax.Array], jax.Array] = nearest_code
) -> ResidualQuantization:
  """Quantizes each row level by level, each level taking what the levels before it left over.

  The residual passes on no gradient to the codewords of earlier levels: each codeword is moved by its own level's loss
  alone, as in RQ-VAE (Lee et al., 2022) and TIGER (Rajput et al., 2023).

  Args:
    z: [B, d] latents.
    codebooks: [L, K, d].
    choose_last: (residuals [B, d], codebook [K, d]) -> codes [B] of the last level; a `balanced_code`, say.

  Returns:
    A `ResidualQuantization`.

  Raises:
    ValueError: if `codebooks` is not of rank 3 or the widths differ.
  """
  if codebooks.ndim != 3:
    raise ValueError(f"codebooks must be [levels, codes, width], got shape {codebooks.shape}")
  residual, residuals, codewords, codes = z, [], [], []
  for level, codebook in enumerate(codebooks):
    code = (choose_last if level == len(codebooks) - 1 else nearest_code)(residual, codebook)
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


# (latents [B, d], codebooks [L, K, d]) -> ResidualQuantization; what a config's `tokenizer.quantizer` may name. A new
# quantizer is one such function and one line here.
QUANTIZERS: dict[str, Callable[[jax.Array, jax.Array], ResidualQuantization]] = {"rq_vae": residual_quantize}


def quantization_error(
  result: ResidualQuantization, *, commitment: float = 0.25, learn_codebooks: bool = True
) -> jax.Array:
  """|sg(r) - e|^2 + commitment |r - sg(e)|^2, averaged over levels (RQ-VAE).

  Args:
    result: a residual quantization of B rows.
    commitment: the weight beta that pulls latents to their codewords.
    learn_codebooks: whether the first term, which moves the codewords, is there; not where moving averages move them.

  Returns:
    [B] float32, one value a row; the squared norms are sums over the width.
  """
  residuals, codewords = result.residuals.astype(jnp.float32), result.codewords.astype(jnp.float32)
  error = commitment * jnp.sum(jnp.square(residuals - jax.lax.stop_gradient(codewords)), axis=-1)
  if learn_codebooks:
    error += jnp.sum(jnp.square(jax.lax.stop_gradient(residuals) - codewords), axis=-1)
  return jnp.mean(error, axis=0)


def decode(codes: jax.Array, codebooks: jax.Array) -> jax.Array:
  """Sum of the codewords that `codes` name: [..., L], [L, K, d] -> [..., d]."""
  return sum(codebooks[level][codes[..., level]] for level in range(codebooks.shape[0]))  # type: ignore[return-value]
