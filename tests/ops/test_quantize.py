"""Residual quantization against a float64 greedy search, its gradients in closed form, balanced codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.ops.quantize import (
  balanced_code,
  code_distances,
  decode,
  nearest_code,
  quantization_error,
  residual_quantize,
  rotation_trick,
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


def test_without_learned_codebooks_the_error_is_the_commitment_alone():
  z, codebooks = sample()
  result = residual_quantize(jnp.asarray(z), jnp.asarray(codebooks))
  both = quantization_error(result, commitment=0.5)
  assert_allclose(quantization_error(result, commitment=0.5, learn_codebooks=False), both / 3, rtol=1e-6)


def rotation_in_float64(z, quantized):
  """The matrix that turns z's direction into that of `quantized` in their plane, and scales its length."""
  u, v = z / np.linalg.norm(z), quantized / np.linalg.norm(quantized)
  cosine = u @ v
  other = v - cosine * u
  sine = np.linalg.norm(other)
  w = other / sine
  turn = np.eye(len(z)) + sine * (np.outer(w, u) - np.outer(u, w)) + (cosine - 1) * (np.outer(u, u) + np.outer(w, w))
  return np.linalg.norm(quantized) / np.linalg.norm(z) * turn


def test_rotation_trick_has_the_codewords_value_and_a_gradient_turned_and_scaled_with_it():
  z, codebooks = sample()
  quantized = np.asarray(residual_quantize(jnp.asarray(z), jnp.asarray(codebooks)).quantized)
  cotangent = np.random.default_rng(2).normal(size=z.shape).astype(np.float32)
  value, pull = jax.vjp(rotation_trick, jnp.asarray(z), jnp.asarray(quantized))
  assert_allclose(value, quantized, atol=1e-6)
  z_gradient, quantized_gradient = pull(jnp.asarray(cotangent))
  expected = [rotation_in_float64(*rows[:2]).T @ rows[2] for rows in zip(z, quantized, cotangent, strict=True)]
  assert_allclose(z_gradient, expected, rtol=1e-4, atol=1e-4)
  assert not np.any(quantized_gradient)


@pytest.mark.parametrize(
  ("z", "quantized"), [([0.0, 0.0], [1.0, 2.0]), ([1.0, 2.0], [0.0, 0.0]), ([1.0, 2.0], [-1.0, -2.0])]
)
def test_rotation_trick_is_straight_through_where_no_rotation_is_defined(z, quantized):
  value, pull = jax.vjp(rotation_trick, jnp.array([z]), jnp.array([quantized]))
  assert_allclose(value, [quantized], atol=1e-6)
  cotangent = jnp.array([[3.0, -1.0]])
  assert_array_equal(pull(cotangent)[0], cotangent)


def test_balanced_codes_use_every_codeword_alike_where_the_nearest_are_few():
  rng = np.random.default_rng(3)
  x = jnp.asarray(rng.normal(size=(40, 3)).astype(np.float32))
  # One codeword in the midst of the points, the others far away.
  codebook = jnp.asarray(np.concatenate([np.zeros((1, 3)), 5 * np.eye(3)]).astype(np.float32))
  assert np.bincount(nearest_code(x, codebook), minlength=4).max() > 30
  counts = np.bincount(balanced_code(x, codebook, epsilon=0.01, iterations=200), minlength=4)
  assert counts.min() >= 8
  assert counts.max() <= 12


def test_balanced_codes_are_the_nearest_where_those_are_balanced_already():
  codebook = np.eye(3, dtype=np.float32) * 4
  x = np.repeat(codebook, 5, axis=0) + np.random.default_rng(4).normal(scale=0.3, size=(15, 3)).astype(np.float32)
  assert_array_equal(balanced_code(jnp.asarray(x), jnp.asarray(codebook)), np.repeat(np.arange(3), 5))


def test_invalid_rows_take_no_part_in_the_balance():
  rng = np.random.default_rng(5)
  x = rng.normal(size=(24, 3)).astype(np.float32)
  codebook = jnp.asarray(rng.normal(size=(4, 3)).astype(np.float32))
  valid = np.arange(24) % 3 != 0
  garbage = np.where(valid[:, None], x, np.float32(50.0))
  codes = balanced_code(jnp.asarray(garbage), codebook, valid=jnp.asarray(valid))
  assert_array_equal(np.asarray(codes)[valid], balanced_code(jnp.asarray(x[valid]), codebook))


def test_balanced_codes_are_those_of_the_global_batch():
  rng = np.random.default_rng(6)
  x = jnp.asarray(rng.normal(size=(24, 3)).astype(np.float32))
  codebook = jnp.asarray(rng.normal(size=(4, 3)).astype(np.float32))
  mapped = jax.vmap(lambda rows: balanced_code(rows, codebook, axis_name="batch"), axis_name="batch")
  assert_array_equal(np.asarray(mapped(x.reshape(4, 6, 3))).reshape(-1), balanced_code(x, codebook))


def test_only_the_last_level_takes_another_choice():
  z, codebooks = sample()
  plain = residual_quantize(jnp.asarray(z), jnp.asarray(codebooks))
  other = residual_quantize(
    jnp.asarray(z), jnp.asarray(codebooks), choose_last=lambda x, codebook: jnp.zeros(len(x), jnp.int32)
  )
  assert_array_equal(other.codes[:, :-1], plain.codes[:, :-1])
  assert not np.any(other.codes[:, -1])
  assert_allclose(other.quantized, decode(other.codes, jnp.asarray(codebooks)), atol=1e-6)


def test_unequal_widths_are_refused_with_both_shapes():
  for call in (nearest_code, code_distances):
    with pytest.raises(ValueError, match=r"\(7, 3\).*\(5, 4\)"):
      call(jnp.zeros((7, 3)), jnp.zeros((5, 4)))
  with pytest.raises(ValueError, match=r"\(7, 3\).*\(5, 4\)"):
    residual_quantize(jnp.zeros((7, 3)), jnp.zeros((2, 5, 4)))


def test_a_single_codebook_without_levels_is_refused_with_its_shape():
  with pytest.raises(ValueError, match=r"levels, codes, width.*\(5, 3\)"):
    residual_quantize(jnp.zeros((7, 3)), jnp.zeros((5, 3)))
