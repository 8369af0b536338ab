"""Counts, perplexity, revival and moving averages of codewords, against explicit loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.ops.codebooks import code_counts, moving_average, perplexity, revive_codes

BATCH, CODES, WIDTH = 24, 5, 3
_revive = jax.jit(revive_codes)


def test_code_counts_equal_bincounts_over_weighted_rows():
  rng = np.random.default_rng(4)
  codes = rng.integers(CODES, size=BATCH)
  valid = rng.random(BATCH) < 0.6
  assert_array_equal(code_counts(jnp.asarray(codes), CODES), np.bincount(codes, minlength=CODES))
  assert_array_equal(
    code_counts(jnp.asarray(codes), CODES, weights=jnp.asarray(valid)), np.bincount(codes[valid], minlength=CODES)
  )


def test_perplexity_is_k_when_uniform_one_when_single_and_the_exponential_entropy_between():
  counts = np.array([[7, 7, 7, 7], [0, 9, 0, 0], [1, 2, 3, 0], [0, 0, 0, 0]], np.float32)
  share = np.array([1, 2, 3]) / 6
  expected = [4.0, 1.0, np.exp(-np.sum(share * np.log(share))), 1.0]
  assert_allclose(perplexity(jnp.asarray(counts)), expected, rtol=1e-6)


def revival_case():
  """Six codes, three of which are chosen less than 0.3 / 6 of the time, and nine residuals, three of them valid."""
  rng = np.random.default_rng(5)
  codebook = rng.normal(size=(6, 2)).astype(np.float32)
  residuals = 10 + rng.normal(size=(9, 2)).astype(np.float32)
  valid = np.zeros(9, bool)
  valid[[2, 5, 6]] = True
  residuals[~valid] = np.nan
  return codebook, np.array([0.4, 0.01, 0.06, 0.0, 0.04, 0.49], np.float32), residuals, valid


@pytest.mark.parametrize("seed", range(5))
def test_revival_moves_only_codes_under_the_threshold_and_only_to_valid_residuals(seed):
  codebook, usage, residuals, valid = revival_case()
  moved, left = _revive(jax.random.key(seed), *map(jnp.asarray, (codebook, usage, residuals, valid)), 0.3)
  assert_array_equal(moved[np.array([0, 2, 5])], codebook[[0, 2, 5]])
  for code in (1, 3, 4):
    assert any(np.array_equal(moved[code], row) for row in residuals[valid])
  assert len(np.unique(np.asarray(moved)[[1, 3, 4]], axis=0)) == 3, "each to a residual of its own, as there are three"
  assert_allclose(left, [0.4, 1 / 6, 0.06, 1 / 6, 1 / 6, 0.49])


def test_revival_draws_from_all_valid_residuals():
  codebook, usage, residuals, valid = revival_case()
  drawn = set()
  for seed in range(12):
    moved, _ = _revive(jax.random.key(seed), *map(jnp.asarray, (codebook, usage, residuals, valid)), 0.3)
    drawn |= {tuple(row) for row in np.asarray(moved)[[1, 3, 4]].tolist()}
  assert drawn == {tuple(row) for row in residuals[valid].tolist()}


@pytest.mark.parametrize("case", ["no row is valid", "the threshold is 0"])
def test_revival_moves_nothing_where(case):
  codebook, usage, residuals, valid = revival_case()
  threshold = 0.0 if case == "the threshold is 0" else 0.3
  valid = valid & (case != "no row is valid")
  moved, left = _revive(jax.random.key(0), *map(jnp.asarray, (codebook, usage, residuals, valid)), threshold)
  assert_array_equal(moved, codebook)
  assert_array_equal(left, usage)


def averaging_case():
  rng = np.random.default_rng(7)
  codebook, total = rng.normal(size=(2, CODES, WIDTH)).astype(np.float32)
  mass = rng.uniform(0.5, 2.0, CODES).astype(np.float32)
  codes = rng.integers(CODES - 1, size=BATCH)  # Nothing chooses the last code.
  residuals = rng.normal(size=(BATCH, WIDTH)).astype(np.float32)
  return codebook, mass, total, codes, residuals, rng.random(BATCH) < 0.7


def test_moving_average_equals_its_definition_code_by_code():
  codebook, mass, total, codes, residuals, valid = averaging_case()
  moved, new_mass, new_total = moving_average(*map(jnp.asarray, averaging_case()), decay=0.9)
  for code in range(CODES):
    rows = residuals[valid & (codes == code)]
    assert_allclose(new_mass[code], 0.9 * mass[code] + 0.1 * len(rows), rtol=1e-5)
    assert_allclose(new_total[code], 0.9 * total[code] + 0.1 * rows.sum(axis=0), rtol=1e-4, atol=1e-6)
    assert_allclose(moved[code], new_total[code] / new_mass[code], rtol=1e-5)
  assert not np.allclose(moved, codebook)


def test_a_code_that_nothing_chooses_stays_where_it_is():
  codebook, mass, _, codes, residuals, valid = averaging_case()
  state = (jnp.asarray(codebook), jnp.asarray(mass), jnp.asarray(codebook * mass[:, None]))
  step = jax.jit(functools.partial(moving_average, decay=0.5))
  for _ in range(200):  # Long enough for its mass to vanish in float32.
    state = step(*state, jnp.asarray(codes), jnp.asarray(residuals), jnp.asarray(valid))
  assert_allclose(state[0][-1], codebook[-1], rtol=1e-4)
  means = [residuals[valid & (codes == code)].mean(axis=0) for code in range(CODES - 1)]
  assert_allclose(state[0][:-1], means, rtol=1e-4, atol=1e-5)


def test_moving_averages_are_those_of_the_global_batch():
  codebook, mass, total, codes, residuals, valid = map(jnp.asarray, averaging_case())
  expected = moving_average(codebook, mass, total, codes, residuals, valid, decay=0.9)
  mapped = jax.vmap(
    lambda *rows: moving_average(codebook, mass, total, *rows, decay=0.9, axis_name="batch"), axis_name="batch"
  )
  results = mapped(codes.reshape(4, -1), residuals.reshape(4, -1, WIDTH), valid.reshape(4, -1))
  for result, whole in zip(results, expected, strict=True):
    for device in result:
      assert_allclose(device, whole, rtol=1e-5, atol=1e-6)
