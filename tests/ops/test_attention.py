"""Attention with an additive bias against NumPy in float64, and who may see whom."""

import jax
import jax.numpy as jnp
import numpy as np
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
    scores = np.array([query[b, t, h] @ key[b, s, h] / np.sqrt(WIDTH) + bias[b, h, t, s] for s in seen])
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
