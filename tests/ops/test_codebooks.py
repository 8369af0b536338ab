"""Counts, perplexity and revival of codewords, against explicit loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.ops.codebooks import code_counts, perplexity, revive_codes

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
