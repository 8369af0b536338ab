"""Attention with an additive bias against NumPy in float64, and who may see whom."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.ops.attention import attention, history_mask

BATCH, LENGTH, HEADS, WIDTH = 2, 7, 3, 4
# Two histories and padding in the first row; padding alone at the end of the second.
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [3, 3, 3, 3, 3, 3, 0]])


def inputs(seed=0):
  rng = np.random.default_rng(seed)
  query, key, value = rng.normal(size=(3, BATCH, LENGTH, HEADS, WIDTH)).astype(np.float32)
  return query, key, value, rng.normal(size=(BATCH, HEADS, LENGTH, LENGTH)).astype(np.float32)


def oracle(query, key, value, mask, bias):
  query, key, value, bias = (x.astype(np.float64) for x in (query, key, value, bias))
  out = np.zeros(query.shape)
  for b, h, t in np.ndindex(BATCH, HEADS, LENGTH):
    seen = np.flatnonzero(mask[b, 0, t])
    scores = np.array([query[b, t, h] @ key[b, s, h] / np.sqrt(WIDTH) for s in seen])
    scores = scores + bias[b, h, t, seen]
    weights = np.exp(scores - scores.max())
    out[b, t, h] = (weights / weights.sum()) @ value[b, seen, h]
  return out


def test_history_mask_equals_a_loop_over_all_positions():
  mask = np.asarray(history_mask(jnp.asarray(SEGMENTS)))
  assert mask.shape == (BATCH, 1, LENGTH, LENGTH)
  for b, t, s in np.ndindex(BATCH, LENGTH, LENGTH):
    same_history = SEGMENTS[b, t] > 0 and SEGMENTS[b, t] == SEGMENTS[b, s] and s <= t
    assert mask[b, 0, t, s] == (same_history or s == t)


def test_attention_equals_numpy_with_and_without_a_bias():
  query, key, value, bias = inputs()
  mask = history_mask(jnp.asarray(SEGMENTS))
  got = attention(*map(jnp.asarray, (query, key, value)), mask=mask, bias=jnp.asarray(bias))
  assert_allclose(got, oracle(query, key, value, np.asarray(mask), bias), atol=1e-5)
  plain = attention(*map(jnp.asarray, (query, key, value)), mask=mask)
  assert_allclose(plain, oracle(query, key, value, np.asarray(mask), np.zeros_like(bias)), atol=1e-5)


def jaxs_own(query, key, value, *, mask, bias):
  full = (BATCH, HEADS, LENGTH, LENGTH)
  bias, mask = jnp.broadcast_to(bias, full), jnp.broadcast_to(mask, full)
  return jax.nn.dot_product_attention(query, key, value, bias=bias, mask=mask)


@pytest.mark.parametrize("shape", [(BATCH, HEADS, LENGTH, LENGTH), (1, HEADS, LENGTH, LENGTH), (BATCH, 1, 1, LENGTH)])
def test_attention_and_its_gradients_equal_jaxs_own(shape):
  query, key, value, bias = map(jnp.asarray, inputs())
  mask = history_mask(jnp.asarray(SEGMENTS))
  bias = bias[: shape[0], : shape[1], : shape[2]]
  cotangent = jnp.asarray(np.random.default_rng(7).normal(size=query.shape), jnp.float32)

  def gradients(function):
    def scalar(*parts):
      return jnp.sum(cotangent * function(*parts[:3], mask=mask, bias=parts[3]))

    return jax.jit(jax.grad(scalar, argnums=(0, 1, 2, 3)))(query, key, value, bias)

  for got, expected in zip(gradients(attention), gradients(jaxs_own), strict=True):
    assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("length", [2, 4, 8, 9])
def test_short_and_long_attention_have_the_values_and_gradients_of_plain_products(length, dtype):
  rng = np.random.default_rng(length)
  query, key, value, cotangent = (jnp.asarray(rng.normal(size=(3, length, 2, 16)), dtype) for _ in range(4))
  bias = jnp.asarray(rng.normal(size=(3, 2, length, length)), jnp.float32)
  mask = jnp.tril(jnp.ones((length, length), bool))[None, None]

  def plain(query, key, value, bias):
    scores = jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32) / 4.0
    weights = jax.nn.softmax(jnp.where(mask, scores + bias, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights.astype(value.dtype), value)

  def bound(query, key, value, bias):
    return attention(query, key, value, mask=mask, bias=bias)

  @functools.partial(jax.jit, static_argnums=0)
  def value_and_gradients(f, *parts):
    result, gradients = jax.vjp(f, *parts)
    return result, *gradients(cotangent)

  tolerance = 1e-5 if dtype == jnp.float32 else 0.05
  got, expected = (value_and_gradients(f, query, key, value, bias) for f in (bound, plain))
  for one, other in zip(got, expected, strict=True):
    assert one.dtype == other.dtype
    assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), atol=tolerance)


def test_the_gradient_of_attentions_gradient_is_that_of_plain_products():
  query, key, value, bias = map(jnp.asarray, inputs())
  mask = history_mask(jnp.asarray(SEGMENTS))

  def curvature(function):
    def scalar(query):
      return jnp.sum(jnp.sin(function(query, key, value, mask=mask, bias=bias)))

    return jax.jit(jax.grad(lambda query: jnp.sum(jnp.square(jax.grad(scalar)(query)))))(query)

  assert_allclose(curvature(attention), curvature(jaxs_own), atol=1e-4)


def test_zero_bias_gives_bit_for_bit_what_no_bias_gives():
  query, key, value, bias = inputs()
  mask = history_mask(jnp.asarray(SEGMENTS))
  for run in (attention, jax.jit(attention)):
    plain = run(query, key, value, mask=mask)
    assert_array_equal(run(query, key, value, mask=mask, bias=jnp.zeros_like(jnp.asarray(bias))), plain)
    assert (np.asarray(run(query, key, value, mask=mask, bias=jnp.asarray(bias))) != np.asarray(plain)).any()


def test_padding_positions_see_themselves_alone_and_stay_finite():
  query, key, value, bias = inputs()
  segments = SEGMENTS.copy()
  segments[1] = 0  # A row of padding only.
  out = attention(
    *map(jnp.asarray, (query, key, value)), mask=history_mask(jnp.asarray(segments)), bias=jnp.asarray(bias)
  )
  padding = segments == 0
  assert_allclose(np.asarray(out)[padding], value[padding], atol=1e-6)
  assert np.isfinite(out).all()


def test_packed_histories_and_padding_do_not_see_each_other():
  query, key, value, bias = inputs()
  mask = history_mask(jnp.asarray(SEGMENTS))
  run = jax.jit(attention)
  before = np.asarray(run(query, key, value, mask=mask, bias=bias))
  other_key, other_value, other_bias = key.copy(), value.copy(), bias.copy()
  for part in (other_key, other_value):
    part[0, 3:5] += 5
  other_bias[0, :, :3, 3:] += 5
  after = np.asarray(run(query, other_key, other_value, mask=mask, bias=other_bias))
  assert_array_equal(after[0, :3], before[0, :3])
  assert_array_equal(after[0, 5:], before[0, 5:])
  assert_array_equal(after[1], before[1])
  assert (after[0, 3:5] != before[0, 3:5]).any(axis=(1, 2)).all()


def test_scores_are_float32_and_the_output_keeps_the_type_of_the_query():
  query, key, value, bias = (jnp.asarray(x, jnp.bfloat16) for x in inputs())
  mask = history_mask(jnp.asarray(SEGMENTS))
  out = attention(query, key, value, mask=mask, bias=bias)
  assert out.dtype == jnp.bfloat16
  expected = oracle(*(np.asarray(x, np.float64) for x in (query, key, value)), np.asarray(mask), np.asarray(bias))
  # The weights are rounded to bfloat16, three significant digits, and so is the result.
  assert_allclose(np.asarray(out, np.float64), expected, atol=0.02)


def test_a_single_query_in_16_bits_is_as_near_to_float64_as_several_are():
  rng = np.random.default_rng(3)
  query, key, value = (jnp.asarray(rng.normal(size=(4, 64, 2, 32)), jnp.bfloat16) for _ in range(3))
  mask = jnp.ones((1, 1, 1, 64), bool)
  several = np.asarray(attention(query, key, value, mask=mask), np.float64)
  single = np.concatenate([attention(query[:, t : t + 1], key, value, mask=mask) for t in range(64)], axis=1)
  q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
  scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(32)
  weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
  exact = np.einsum("bhts,bshd->bthd", weights / weights.sum(axis=-1, keepdims=True), v)
  error = [np.sqrt(np.mean(np.square(np.asarray(got, np.float64) - exact))) for got in (several, single)]
  assert error[1] < 1.1 * error[0]
  assert error[0] < 0.01
