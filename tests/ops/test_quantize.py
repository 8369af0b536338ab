"""Residual quantization against a float64 greedy search, its gradients in closed form, k-means on known clusters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.ops.quantize import (
  code_counts,
  code_distances,
  decode,
  kmeans,
  nearest_code,
  perplexity,
  quantization_error,
  residual_kmeans,
  residual_quantize,
  revive_codes,
  straight_through,
)

BATCH, LEVELS, CODES, WIDTH = 24, 3, 5, 6
NUM_POINTS = 120

_kmeans = jax.jit(kmeans, static_argnames=("num_codes", "iterations", "block"))
_revive = jax.jit(revive_codes)
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


@pytest.fixture(scope="module")
def clusters():
  """Points [80, 2] of four clusters far apart, their labels, and the clusters' means."""
  rng = np.random.default_rng(3)
  labels = np.arange(80) % 4
  points = 20.0 * np.array([[0, 0], [1, 0], [0, 1], [1, 1]])[labels] + rng.normal(size=(80, 2))
  return points.astype(np.float32), labels, np.stack([points[labels == label].mean(axis=0) for label in range(4)])


def cluster(points, *, seed=0, weights=None, block=16384):
  """Four-means padded with rows of weight 0 to one shape, so that the tests share one compiled program."""
  weights = np.ones(len(points)) if weights is None else weights
  missing = NUM_POINTS - len(points)
  points = np.pad(points, ((0, missing), (0, 0)), mode="edge")
  weights = np.pad(weights, (0, missing))
  centres, codes = _kmeans(
    jax.random.key(seed), jnp.asarray(points, jnp.float32), num_codes=4, weights=jnp.asarray(weights), block=block
  )
  return np.asarray(centres), np.asarray(codes)[: NUM_POINTS - missing]


def in_order(rows):
  rows = np.asarray(rows)
  return rows[np.lexsort(np.round(rows).T)]


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


def test_equal_latents_in_two_streams_get_equal_codes():
  z, codebooks = sample()
  rng = np.random.default_rng(1)
  other = rng.normal(size=z.shape).astype(np.float32)
  streams = jnp.concatenate([z, other, z[::-1]])
  codes = np.asarray(residual_quantize(streams, jnp.asarray(codebooks)).codes).reshape(3, BATCH, LEVELS)
  assert_array_equal(codes[0], codes[2][::-1])
  assert (codes[0] != codes[1]).any()


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
  counts = np.asarray(code_counts(jnp.asarray(codes), CODES))
  assert (counts == 0).any(), "no codeword is unused: the next line would assert nothing"
  assert not np.any(np.asarray(codebook_gradient)[counts == 0])


def test_code_counts_equal_bincounts_over_valid_rows():
  rng = np.random.default_rng(4)
  codes = rng.integers(CODES, size=(BATCH, LEVELS))
  valid = rng.random(BATCH) < 0.6
  for rows, given in ((np.ones(BATCH, bool), None), (valid, jnp.asarray(valid))):
    expected = [np.bincount(codes[rows, level], minlength=CODES) for level in range(LEVELS)]
    assert_array_equal(code_counts(jnp.asarray(codes), CODES, valid=given), expected)


def test_perplexity_is_k_when_uniform_one_when_single_and_the_exponential_entropy_between():
  counts = np.array([[7, 7, 7, 7], [0, 9, 0, 0], [1, 2, 3, 0], [0, 0, 0, 0]], np.float32)
  share = np.array([1, 2, 3]) / 6
  expected = [4.0, 1.0, np.exp(-np.sum(share * np.log(share))), 1.0]
  assert_allclose(perplexity(jnp.asarray(counts)), expected, rtol=1e-6)


def revival_case():
  rng = np.random.default_rng(5)
  codebook = rng.normal(size=(6, 2)).astype(np.float32)
  residuals = 10 + rng.normal(size=(9, 2)).astype(np.float32)
  valid = np.zeros(9, bool)
  valid[[2, 5, 6]] = True
  residuals[~valid] = np.nan
  return codebook, np.array([0, 5, 3, 9, 4, 0], np.int32), residuals, valid


@pytest.mark.parametrize("seed", range(5))
def test_revival_moves_only_codes_idle_beyond_patience_and_only_to_valid_residuals(seed):
  codebook, idle, residuals, valid = revival_case()
  moved, left = _revive(jax.random.key(seed), *map(jnp.asarray, (codebook, idle, residuals, valid)), 3)
  assert_array_equal(moved[np.array([0, 2, 5])], codebook[[0, 2, 5]])
  for code in (1, 3, 4):
    assert any(np.array_equal(moved[code], row) for row in residuals[valid])
  assert_array_equal(left, [0, 0, 3, 0, 0, 0])


def test_revival_draws_from_all_valid_residuals():
  codebook, idle, residuals, valid = revival_case()
  drawn = set()
  for seed in range(12):
    moved, _ = _revive(jax.random.key(seed), *map(jnp.asarray, (codebook, idle, residuals, valid)), 3)
    drawn |= {tuple(row) for row in np.asarray(moved)[[1, 3, 4]].tolist()}
  assert drawn == {tuple(row) for row in residuals[valid].tolist()}


def test_revival_moves_nothing_where_no_row_is_valid():
  codebook, idle, residuals, valid = revival_case()
  moved, left = _revive(jax.random.key(0), *map(jnp.asarray, (codebook, idle, residuals, valid & False)), 3)
  assert_array_equal(moved, codebook)
  assert_array_equal(left, idle)


def test_kmeans_finds_well_separated_clusters(clusters):
  points, labels, means = clusters
  centres, codes = cluster(points)
  assert_allclose(in_order(centres), in_order(means), atol=1e-3)
  assert_allclose(centres[codes], means[labels], atol=1e-3)


def test_kmeans_without_weights_counts_every_row_alike(clusters):
  points, labels, means = clusters
  centres, codes = kmeans(jax.random.key(0), jnp.asarray(points), num_codes=4)
  assert_allclose(in_order(centres), in_order(means), atol=1e-3)
  assert_allclose(np.asarray(centres)[codes], means[labels], atol=1e-3)


def test_kmeans_centres_are_weighted_means(clusters):
  points, labels, _ = clusters
  weights = 1.0 + np.arange(80) % 7
  expected = [np.average(points[labels == label], axis=0, weights=weights[labels == label]) for label in range(4)]
  centres, _ = cluster(points, weights=weights)
  assert_allclose(in_order(centres), in_order(expected), atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_weight_zero_take_no_part_in_kmeans(clusters, seed):
  points, _, means = clusters
  garbage = 1000 * np.random.default_rng(6).normal(size=(40, 2)).astype(np.float32)
  weights = np.concatenate([np.zeros(40), np.ones(80)])
  centres, _ = cluster(np.concatenate([garbage, points]), seed=seed, weights=weights)
  assert_allclose(in_order(centres), in_order(means), atol=1e-3)


def test_kmeans_with_fewer_distinct_points_than_codes_puts_a_centre_on_each():
  points = np.array([[0, 0], [0, 0], [3, 1], [3, 1], [-2, 5]], np.float32)
  centres, codes = _kmeans(jax.random.key(0), jnp.asarray(points), num_codes=8)
  assert np.isfinite(centres).all()
  assert_array_equal(np.asarray(centres)[codes], points)


def test_blocked_assignment_equals_unblocked():
  points = np.random.default_rng(7).normal(size=(NUM_POINTS, 2))
  whole, whole_codes = cluster(points)
  parts, part_codes = cluster(points, block=50)
  assert_array_equal(part_codes, whole_codes)
  assert_allclose(parts, whole, atol=1e-6)


def test_mean_squared_residual_falls_with_each_level_of_residual_kmeans_and_ignores_rows_of_weight_zero():
  points = np.random.default_rng(8).normal(size=(96, 4)).astype(np.float32)
  together = np.concatenate([points, np.full((5, 4), 300, np.float32)])
  weights = np.concatenate([np.ones(96), np.zeros(5)])
  codebooks = np.asarray(
    residual_kmeans(jax.random.key(0), jnp.asarray(together), num_levels=3, num_codes=6, weights=jnp.asarray(weights)),
    np.float64,
  )
  assert codebooks.shape == (3, 6, 4)
  assert np.abs(codebooks).max() < 5, "a codeword went after a row of weight zero"
  codes, _ = greedy(points, codebooks)
  residual = points.astype(np.float64)
  energies = [np.square(residual).sum(axis=1).mean()]
  for level in range(3):
    residual = residual - codebooks[level][codes[:, level]]
    energies.append(np.square(residual).sum(axis=1).mean())
  assert (np.diff(energies) < 0).all(), energies


def test_unequal_widths_are_refused_with_both_shapes():
  for call in (nearest_code, code_distances):
    with pytest.raises(ValueError, match=r"\(7, 3\).*\(5, 4\)"):
      call(jnp.zeros((7, 3)), jnp.zeros((5, 4)))
  with pytest.raises(ValueError, match=r"\(7, 3\).*\(5, 4\)"):
    residual_quantize(jnp.zeros((7, 3)), jnp.zeros((2, 5, 4)))


def test_a_single_codebook_without_levels_is_refused_with_its_shape():
  with pytest.raises(ValueError, match=r"levels, codes, width.*\(5, 3\)"):
    residual_quantize(jnp.zeros((7, 3)), jnp.zeros((5, 3)))
