"""Residual quantization against a float64 greedy search, its gradients in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.ops.quantize import (
  channel_levels,
  code_distances,
  decode,
  finite_code,
  finite_codebook,
  nearest_code,
  quantization_error,
  residual_quantize,
  straight_through,
)

BATCH, LEVELS, CODES, WIDTH = 24, 3, 5, 6

_error_gradients = jax.jit(
  jax.grad(
    lambda z, codebooks, commitment: jnp.sum(
      quantization_error(residual_quantize(z, codebooks), commitment=commitment)
    ),
    argnums=(0, 1),
  )
)


def sample(seed=0):
  rng = np.random.default_rng(seed)
  z = rng.normal(size=(BATCH, WIDTH)).astype(np.float32)
  # Smaller codewords at later levels, as residuals are, so that each level matters.
  scale = 2.0 ** -np.arange(LEVELS)[:, None, None]
  return z, (rng.normal(size=(LEVELS, CODES, WIDTH)) * scale).astype(np.float32)


def greedy(z, codebooks):
  """Codes [B, L] and residuals [L, B, d] by explicit distances in float64."""
  residual, codes, residuals = z.astype(np.float64), [], []
  for codebook in codebooks.astype(np.float64):
    distances = np.square(residual[:, None] - codebook[None]).sum(axis=-1)
    codes.append(distances.argmin(axis=1))
    residuals.append(residual)
    residual = residual - codebook[codes[-1]]
  return np.stack(codes, axis=1), np.stack(residuals)


def test_residual_quantize_equals_greedy_search_in_float64():
  z, codebooks = sample()
  result = residual_quantize(jnp.asarray(z), jnp.asarray(codebooks))
  codes, residuals = greedy(z, codebooks)
  chosen = np.stack([codebooks[level][codes[:, level]] for level in range(LEVELS)])
  assert_array_equal(result.codes, codes)
  assert result.codes.dtype == jnp.int32
  assert_array_equal(result.codewords, chosen)
  assert_allclose(result.residuals, residuals, atol=1e-6)
  assert_allclose(result.quantized, chosen.astype(np.float64).sum(axis=0), atol=1e-6)


def test_decoding_the_codes_gives_the_quantized_vectors():
  z, codebooks = sample()
  result = residual_quantize(jnp.asarray(z), jnp.asarray(codebooks))
  assert_array_equal(decode(result.codes, jnp.asarray(codebooks)), result.quantized)
  grid = result.codes.reshape(4, 6, LEVELS)
  assert_array_equal(decode(grid, jnp.asarray(codebooks)), result.quantized.reshape(4, 6, WIDTH))


def test_nearest_code_breaks_ties_by_the_lowest_index():
  codebook = jnp.array([[3.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
  assert_array_equal(nearest_code(jnp.array([[0.0, 5.0], [1.0, 0.0], [2.0, 0.0]]), codebook), [1, 1, 0])


def test_bfloat16_latents_are_compared_in_float32():
  # Both codewords and the latent are exact in bfloat16, but their squares and products are not.
  x = jnp.array([[16.125]], jnp.bfloat16)
  codebook = jnp.array([[16.0], [16.125]], jnp.bfloat16)
  in_bfloat16 = jnp.square(codebook[:, 0]) - 2 * x[0, 0] * codebook[:, 0]
  assert jnp.argmin(in_bfloat16) == 0, "the case no longer shows the fault it is there for"
  assert_array_equal(nearest_code(x, codebook), [1])
  assert_array_equal(nearest_code(x, codebook.astype(jnp.float32)), [1])
  assert code_distances(x, codebook).dtype == jnp.float32


def test_straight_through_has_the_codewords_value_and_the_latents_gradient():
  z, codebooks = sample()
  cotangent = np.random.default_rng(2).normal(size=z.shape).astype(np.float32)

  def passed(z, codebooks):
    return straight_through(z, residual_quantize(z, codebooks).quantized)

  value, pull = jax.vjp(passed, jnp.asarray(z), jnp.asarray(codebooks))
  codes, _ = greedy(z, codebooks)
  assert_allclose(value, sum(codebooks[level][codes[:, level]] for level in range(LEVELS)), atol=1e-6)
  z_gradient, codebook_gradient = pull(jnp.asarray(cotangent))
  assert_array_equal(z_gradient, cotangent)
  assert not np.any(codebook_gradient)


def test_quantization_error_equals_its_formula():
  z, codebooks = sample()
  codes, residuals = greedy(z, codebooks)
  chosen = np.stack([codebooks[level][codes[:, level]] for level in range(LEVELS)])
  squared = np.square(residuals - chosen).sum(axis=-1).mean(axis=0)
  result = residual_quantize(jnp.asarray(z), jnp.asarray(codebooks))
  assert_allclose(quantization_error(result), 1.25 * squared, rtol=1e-5)
  assert_allclose(quantization_error(result, commitment=0.0), squared, rtol=1e-5)


@pytest.mark.parametrize("commitment", [0.0, 0.25])
def test_codebook_term_moves_only_chosen_codewords_of_its_level_and_commitment_only_latents(commitment):
  z, codebooks = sample()
  z_gradient, codebook_gradient = _error_gradients(z, codebooks, commitment)
  codes, residuals = greedy(z, codebooks)
  by_codeword, by_latent = np.zeros(codebooks.shape), np.zeros(z.shape)
  for level in range(LEVELS):
    for row in range(BATCH):
      difference = residuals[level, row] - codebooks[level, codes[row, level]]
      by_codeword[level, codes[row, level]] -= 2 * difference / LEVELS
      by_latent[row] += commitment * 2 * difference / LEVELS
  assert_allclose(codebook_gradient, by_codeword, atol=1e-5)
  assert_allclose(z_gradient, by_latent, atol=1e-5)
  counts = np.stack([np.bincount(codes[:, level], minlength=CODES) for level in range(LEVELS)])
  assert (counts == 0).any(), "no codeword is unused: the next line would assert nothing"
  assert not np.any(np.asarray(codebook_gradient)[counts == 0])


def test_unequal_widths_are_refused_with_both_shapes():
  for call in (nearest_code, code_distances):
    with pytest.raises(ValueError, match=r"\(7, 3\).*\(5, 4\)"):
      call(jnp.zeros((7, 3)), jnp.zeros((5, 4)))
  with pytest.raises(ValueError, match=r"\(7, 3\).*\(5, 4\)"):
    residual_quantize(jnp.zeros((7, 3)), jnp.zeros((2, 5, 4)))


def test_a_single_codebook_without_levels_is_refused_with_its_shape():
  with pytest.raises(ValueError, match=r"levels, codes, width.*\(5, 3\)"):
    residual_quantize(jnp.zeros((7, 3)), jnp.zeros((5, 3)))


@pytest.mark.parametrize(
  ("num_codes", "channels", "levels"),
  [(256, 8, (2,) * 8), (256, 4, (4,) * 4), (30, 2, (5, 6)), (7, 3, (7, 1, 1)), (1, 2, (1, 1))],
)
def test_values_are_shared_out_evenly_over_channels(num_codes, channels, levels):
  assert channel_levels(num_codes, channels) == levels


@pytest.mark.parametrize("levels", [(2, 3), (5, 1), (4, 2, 3)])
def test_finite_codes_are_the_nearest_of_their_codebook(levels):
  codebook = finite_codebook(levels)
  assert codebook.shape == (np.prod(levels), len(levels))
  assert_array_equal(finite_code(jnp.asarray(codebook), levels), np.arange(len(codebook)))
  z = np.random.default_rng(0).uniform(-1, 1, size=(200, len(levels))).astype(np.float32)
  nearest = np.square(z[:, None] - codebook[None]).sum(axis=-1).argmin(axis=1)
  assert_array_equal(finite_code(jnp.asarray(z), levels), nearest)
  ends = jnp.asarray([[-1.0] * len(levels), [1.0] * len(levels)])
  assert_array_equal(finite_code(ends, levels), [0, len(codebook) - 1])
