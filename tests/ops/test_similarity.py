"""Similarity buckets and the bias read off them, against explicit loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.ops.contrastive import normalize
from bbqrec_jax.ops.similarity import (
  bucket_bias,
  continuous_bias,
  equal_frequency_edges,
  overlap_edges,
  pair_similarity,
  similarity_buckets,
  stream_pairs,
)

BATCH, LENGTH, STREAMS, WIDTH, BUCKETS, HEADS = 3, 6, 2, 5, 4, 2
PAIRS = stream_pairs(STREAMS)

_buckets = jax.jit(similarity_buckets, static_argnames="pairs")


def histories(seed=0):
  """Vectors with absent streams, padding at the end of rows, and edges of their own for each pair."""
  rng = np.random.default_rng(seed)
  vectors = rng.normal(size=(BATCH, LENGTH, STREAMS, WIDTH)).astype(np.float32)
  vectors[0, 2, 1] = 0
  vectors[1, 0, 0] = 0
  vectors[2, 3] = 0
  real = np.arange(LENGTH) < np.array([6, 4, 5])[:, None]
  edges = np.sort(rng.uniform(-0.7, 0.7, size=(len(PAIRS), BUCKETS - 1)), axis=1).astype(np.float32)
  return vectors, real, edges


def cosine(a, b):
  a, b = a.astype(np.float64), b.astype(np.float64)
  return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def brute_force_buckets(vectors, real, edges):
  buckets = np.full((len(PAIRS), BATCH, LENGTH, LENGTH), -1)
  for p, (s, t) in enumerate(PAIRS):
    for b, i, j in np.ndindex(BATCH, LENGTH, LENGTH):
      here = real[b, i] and real[b, j] and all(vectors[b, x, y].any() for x in (i, j) for y in (s, t))
      if not here:
        buckets[p, b, i, j] = BUCKETS + 1
      elif i == j:
        buckets[p, b, i, j] = BUCKETS
      else:
        first, second = vectors[b, i], vectors[b, j]
        value = (cosine(first[s], second[t]) + cosine(first[t], second[s])) / 2
        buckets[p, b, i, j] = sum(value >= edge for edge in edges[p])
  return buckets


def test_stream_pairs_are_each_stream_with_itself_then_every_two():
  assert stream_pairs(3) == ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))
  assert stream_pairs(3, cross=False) == ((0, 0), (1, 1), (2, 2))
  assert stream_pairs(1) == ((0, 0),)


def test_buckets_equal_a_loop_over_all_positions():
  vectors, real, edges = histories()
  expected = brute_force_buckets(vectors, real, edges)
  assert set(np.unique(expected)) == set(range(BUCKETS + 2)), "the example leaves a bucket untried"
  assert_array_equal(_buckets(*map(jnp.asarray, (vectors, real, edges)), pairs=PAIRS), expected)


def test_values_on_an_edge_belong_to_the_bucket_above():
  vectors = np.array([[1, 0], [0, 1], [-1, 0], [1, 0]], np.float32)[None, :, None]
  edges = jnp.array([[-1.0, 0.0, 1.0]])
  buckets = _buckets(jnp.asarray(vectors), jnp.ones((1, 4), bool), edges, pairs=((0, 0),))[0, 0]
  assert_array_equal(buckets, [[4, 2, 1, 3], [2, 4, 2, 2], [1, 2, 4, 1], [3, 2, 1, 4]])


def test_cosines_equal_numpy_and_the_cross_pair_is_the_symmetric_mean_of_both_directions():
  vectors, _, _ = histories()
  unit = normalize(jnp.asarray(vectors))
  exact = np.divide(
    vectors, np.linalg.norm(vectors, axis=-1, keepdims=True), out=np.zeros_like(vectors), where=vectors != 0
  ).astype(np.float64)
  text, image = exact[:, :, 0], exact[:, :, 1]
  assert_allclose(pair_similarity(unit, (0, 0)), text @ text.swapaxes(1, 2), atol=1e-6)
  assert_allclose(pair_similarity(unit, (1, 1)), image @ image.swapaxes(1, 2), atol=1e-6)
  crossed = pair_similarity(unit, (0, 1))
  assert_allclose(crossed, 0.5 * (text @ image.swapaxes(1, 2) + image @ text.swapaxes(1, 2)), atol=1e-6)
  assert_array_equal(crossed, np.swapaxes(crossed, 1, 2))
  assert_allclose(crossed, pair_similarity(unit, (1, 0)), atol=1e-6)


def test_equal_vectors_in_two_streams_make_the_cross_pair_the_plain_cosine():
  vectors, _, _ = histories()
  twice = normalize(jnp.asarray(np.stack([vectors[:, :, 0]] * 2, axis=2)))
  assert_allclose(pair_similarity(twice, (0, 1)), pair_similarity(twice, (0, 0)), atol=1e-6)


def coded(levels=3, seed=4):
  """Codes [B, T, S, L] of three values, some streams absent."""
  codes = np.random.default_rng(seed).integers(3, size=(BATCH, LENGTH, STREAMS, levels))
  codes[0, 2, 1], codes[1, 0, 0] = -1, -1
  return codes, np.arange(LENGTH) < np.array([6, 4, 5])[:, None]


def shared(first, second):
  return next((level for level, (a, b) in enumerate(zip(first, second, strict=True)) if a != b), len(first))


def test_of_codes_the_similarity_is_the_length_of_the_shared_prefix():
  codes, real = coded()
  levels = codes.shape[-1]
  edges = np.tile(overlap_edges(levels), (len(PAIRS), 1))
  assert edges.shape[1] == 2 * levels
  buckets = np.asarray(_buckets(*map(jnp.asarray, (codes, real, edges)), pairs=PAIRS))
  for p, (s, t) in enumerate(PAIRS):
    for b, i, j in np.ndindex(BATCH, LENGTH, LENGTH):
      here = real[b, i] and real[b, j] and all(codes[b, x, y, 0] >= 0 for x in (i, j) for y in (s, t))
      # Twice the mean of both directions: a bucket for each half.
      twice = shared(codes[b, i, s], codes[b, j, t]) + shared(codes[b, i, t], codes[b, j, s])
      expected = 2 * levels + 2 if not here else 2 * levels + 1 if i == j else twice
      assert buckets[p, b, i, j] == expected
  assert set(np.unique(buckets[2])) >= {0, 1, 2, 3}, "the example leaves halves untried"


def test_the_continuous_bias_is_a_slope_times_the_similarity():
  vectors, real, _ = histories()
  tables = np.random.default_rng(5).normal(size=(len(PAIRS), HEADS, 3)).astype(np.float32)
  got = continuous_bias(*map(jnp.asarray, (tables, vectors, real)), pairs=PAIRS)
  for b, h, i, j in np.ndindex(BATCH, HEADS, LENGTH, LENGTH):
    expected = 0.0
    for p, (s, t) in enumerate(PAIRS):
      first, second = vectors[b, i], vectors[b, j]
      here = real[b, i] and real[b, j] and all(x[y].any() for x in (first, second) for y in (s, t))
      slope, own, missing = tables[p, h]
      if not here:
        expected += missing
      elif i == j:
        expected += own
      else:
        expected += slope * (cosine(first[s], second[t]) + cosine(first[t], second[s])) / 2
    assert_allclose(got[b, h, i, j], expected, atol=1e-5)


def test_equal_frequency_edges_split_the_samples_evenly():
  samples = np.random.default_rng(1).normal(size=800).astype(np.float32)
  edges = equal_frequency_edges(samples, 8)
  assert edges.shape == (7,)
  assert edges.dtype == np.float32
  assert_array_equal(np.bincount(np.searchsorted(edges, samples, side="right"), minlength=8), [100] * 8)


def test_equal_frequency_edges_keep_ties_in_one_bucket_and_do_not_descend():
  samples = np.repeat([0.1, 0.5, 0.9], [90, 5, 5])
  edges = equal_frequency_edges(samples, 4)
  assert (np.diff(edges) >= 0).all()
  buckets = np.searchsorted(edges, samples.astype(np.float32), side="right")
  assert all(len(set(buckets[samples == value])) == 1 for value in (0.1, 0.5, 0.9))


def test_rounding_does_not_part_equal_items():
  """The cosine of one item with itself, as several programs compute it, over both sides of a quantile."""
  below = np.random.default_rng(3).uniform(-0.9, 0.9, size=900)
  equal = np.float32(1) + np.float32(6e-8) * np.arange(-3, 4, dtype=np.float32)
  edges = equal_frequency_edges(np.concatenate([below, np.resize(equal, 100)]), 32)
  assert len(set(np.searchsorted(edges, equal, side="right").tolist())) == 1


def test_edges_without_a_sample_are_refused():
  with pytest.raises(ValueError, match="no similarity"):
    equal_frequency_edges(np.zeros(0), 4)


def random_tables():
  rng = np.random.default_rng(2)
  tables = rng.normal(size=(len(PAIRS), HEADS, BUCKETS + 2)).astype(np.float32)
  return tables, rng.integers(BUCKETS + 2, size=(len(PAIRS), BATCH, LENGTH, LENGTH))


def test_bias_equals_a_gather_from_the_tables_summed_over_pairs():
  tables, buckets = random_tables()
  expected = sum(tables[p].astype(np.float64)[:, buckets[p]].swapaxes(0, 1) for p in range(len(PAIRS)))
  assert_allclose(bucket_bias(jnp.asarray(tables), jnp.asarray(buckets)), expected, atol=1e-6)


def test_gradient_of_the_bias_equals_a_scatter_into_the_tables():
  tables, buckets = random_tables()
  cotangent = np.random.default_rng(3).normal(size=(BATCH, HEADS, LENGTH, LENGTH)).astype(np.float32)
  _, pull = jax.vjp(lambda tables: bucket_bias(tables, jnp.asarray(buckets)), jnp.asarray(tables))
  expected = np.zeros(tables.shape)
  for p, h in np.ndindex(len(PAIRS), HEADS):
    np.add.at(expected[p, h], buckets[p], cotangent[:, h])
  assert_allclose(pull(jnp.asarray(cotangent))[0], expected, atol=1e-5)


def test_zero_tables_give_a_bias_of_exact_zeros():
  _, buckets = random_tables()
  bias = bucket_bias(jnp.zeros((len(PAIRS), HEADS, BUCKETS + 2)), jnp.asarray(buckets))
  assert_array_equal(bias, np.zeros((BATCH, HEADS, LENGTH, LENGTH)))
