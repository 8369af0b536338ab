"""Sums of code embeddings against NumPy, value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from bbqrec_jax.ops.embedding import summed_embedding

COLUMNS, CODES, WIDTH = 3, 5, 4


@pytest.mark.parametrize("shape", [(), (7,), (2, 6)])
def test_value_and_gradient_with_codes_that_repeat_and_that_are_absent(shape):
  rng = np.random.default_rng(0)
  table = rng.normal(size=(COLUMNS, CODES, WIDTH)).astype(np.float32)
  codes = rng.integers(-1, CODES + 1, (*shape, COLUMNS))
  factor = rng.normal(size=(*shape, WIDTH)).astype(np.float32)
  expected, gradient = np.zeros((*shape, WIDTH)), np.zeros(table.shape)
  for place in np.ndindex(shape):
    for column, code in enumerate(codes[place]):
      if 0 <= code < CODES:
        expected[place] += table[column, code]
        gradient[column, code] += factor[place]
  assert_allclose(jax.jit(summed_embedding)(table, codes), expected, rtol=1e-6)
  got = jax.jit(jax.grad(lambda table: jnp.sum(factor * summed_embedding(table, codes))))(table)
  assert_allclose(got, gradient, rtol=1e-5, atol=1e-6)


def test_bfloat16_gradients_are_summed_in_float32():
  table = jnp.zeros((1, 2, 1), jnp.bfloat16)
  codes = jnp.zeros((1000, 1), jnp.int32)
  # One by one, 1,000 ones would stay at 256 in bfloat16.
  got = jax.grad(lambda table: jnp.sum(summed_embedding(table, codes).astype(jnp.float32)))(table)
  assert got.dtype == jnp.bfloat16
  assert_allclose(got[0, :, 0].astype(jnp.float32), [1000.0, 0.0])
