"""Dropout: how much is dropped, what is kept, and that it is off when it should be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from bbqrec_jax.layers.dropout import Dropout


def drop(x, rate, *, seed=0, deterministic=False):
  return Dropout(rate, deterministic=deterministic).apply({}, x, rngs={"dropout": jax.random.key(seed)})


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.9])
def test_the_share_that_is_dropped_and_the_scale_of_the_rest(rate):
  out = np.asarray(drop(jnp.ones((50, 40, 33)), rate))  # Not a multiple of four elements.
  kept = 256 - round(256 * rate)
  # Four standard deviations of the share of 66,000 draws.
  assert np.mean(out == 0) == pytest.approx(1 - kept / 256, abs=4 * 0.5 / np.sqrt(out.size))
  assert_array_equal(out[out != 0], np.float32(256 / kept))
  assert out.mean() == pytest.approx(1.0, abs=4 / np.sqrt(out.size) * (1 / (1 - rate)))


def test_elements_are_dropped_independently():
  out = np.asarray(drop(jnp.ones((1000, 64)), 0.5)) == 0
  correlation = np.corrcoef(out.T)[~np.eye(64, dtype=bool)]
  assert np.abs(correlation).max() < 5 / np.sqrt(1000)


def test_the_key_decides():
  x = jnp.ones((20, 20))
  assert_array_equal(drop(x, 0.5), drop(x, 0.5))
  assert (np.asarray(drop(x, 0.5)) != np.asarray(drop(x, 0.5, seed=1))).any()


def test_nothing_is_dropped_at_rate_zero_or_when_deterministic():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)), jnp.float32)
  assert_array_equal(drop(x, 0.5, deterministic=True), x)
  assert_array_equal(drop(x, 0.0), x)


def test_the_highest_rate_keeps_something():
  out = np.asarray(drop(jnp.ones((100, 1000)), 0.9999))
  assert_array_equal(out[out != 0], np.float32(256))
  assert 200 < np.count_nonzero(out) < 600


def test_the_type_stays():
  x = jnp.ones((8, 8), jnp.bfloat16)
  assert drop(x, 0.3).dtype == jnp.bfloat16


def test_the_gradient_is_the_mask_that_was_applied():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(9, 5)), jnp.float32)
  gradient = jax.grad(lambda x: jnp.sum(drop(x, 0.3)))(x)
  assert_array_equal(gradient != 0, np.asarray(drop(x, 0.3)) != 0)
