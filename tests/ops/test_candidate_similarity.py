"""Numbers added to candidates' scores: against loops, and what they must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bbqrec_jax.ops.candidate_similarity import (
  latest_first,
  neighbour_scores,
  principal_axes,
  tail_edges,
  unit_rows,
  vector_scores,
)

ITEMS, PLACES, BUCKETS = 12, 4, 5


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def expected_of_vectors(unit, edges, table, recent):
  result = np.zeros((len(recent), len(unit)))
  for row, places in enumerate(recent):
    for place, own in enumerate(places):
      for item in range(len(unit)) if own >= 0 else ():
        if item == own:
          column = BUCKETS
        elif not unit[item].any() or not unit[own].any():
          column = BUCKETS + 1
        else:
          column = np.sum(unit[item] @ unit[own] > edges)
        result[row, item] += table[place, column]
  return result


def test_vector_scores_are_those_of_a_loop(rng):
  vectors = rng.normal(size=(ITEMS, 5)).astype(np.float32)
  vectors[3] = 0
  unit, edges = unit_rows(vectors), tail_edges(vectors, BUCKETS, seed=0)
  table = rng.normal(size=(PLACES, BUCKETS + 2)).astype(np.float32)
  recent = np.array([[2, 3, 5, -1], [7, -1, -1, -1], [-1, -1, -1, -1]], np.int32)
  expected = expected_of_vectors(unit, edges, table, recent)
  np.testing.assert_allclose(vector_scores(unit, edges, table, recent), expected, atol=1e-5)
  some = np.array([[0, 3, 5], [7, 8, 2], [1, 1, 1]], np.int32)
  found = vector_scores(unit, edges, table, recent, some)
  np.testing.assert_allclose(found, np.take_along_axis(expected, some, axis=1), atol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("rows", [50, 20_000])
def test_principal_axes_are_those_of_a_singular_value_decomposition(rng, rows, count):
  scale = 3.0 ** -np.arange(7)
  turned, _ = np.linalg.qr(rng.normal(size=(7, 7)))
  vectors = rng.normal(size=(rows, 7)) * scale @ turned
  axes = principal_axes(vectors, count)
  np.testing.assert_allclose(axes.T @ axes, np.eye(count), atol=1e-5)
  expected = np.linalg.svd(vectors, full_matrices=False)[2][:count].T
  # Of 20,000 rows some are drawn, whose axes are nearly theirs.
  np.testing.assert_allclose(np.abs(expected.T @ axes), np.eye(count), atol=1e-3 if rows < 100 else 0.03)
  np.testing.assert_array_equal(axes, principal_axes(vectors, count))
  assert principal_axes(np.zeros((5, 2)), 4).shape == (2, 2)


def test_neighbour_scores_are_those_of_a_loop(rng):
  neighbours = np.full((ITEMS, 2), -1, np.int32)
  neighbours[0], neighbours[1], neighbours[2] = (1, 2), (0, -1), (3, 0)
  buckets = rng.integers(0, 3, (ITEMS, 2)).astype(np.int32)
  table = rng.normal(size=(PLACES, 3)).astype(np.float32)
  recent = np.array([[2, 1, -1, -1], [0, 5, 2, -1]], np.int32)
  expected = np.zeros((2, ITEMS))
  for row, places in enumerate(recent):
    for place, own in enumerate(places):
      for item, bucket in zip(neighbours[own], buckets[own], strict=True) if own >= 0 else ():
        if item >= 0:
          expected[row, item] += table[place, bucket]
  np.testing.assert_allclose(neighbour_scores(neighbours, buckets, table, recent), expected, atol=1e-6)
  some = np.array([[0, 3, 5], [2, 1, 0]], np.int32)
  found = neighbour_scores(neighbours, buckets, table, recent, some)
  np.testing.assert_allclose(found, np.take_along_axis(expected, some, axis=1), atol=1e-6)


def test_zero_tables_add_nothing_and_can_be_learned(rng):
  unit = unit_rows(rng.normal(size=(ITEMS, 5)))
  edges, recent = tail_edges(unit, BUCKETS, seed=0), np.array([[2, 3, 5, -1]], np.int32)
  zeros = jnp.zeros((PLACES, BUCKETS + 2))
  assert not np.any(vector_scores(unit, edges, zeros, recent))
  gradient = jax.grad(lambda table: vector_scores(unit, edges, table, recent)[0, 7])(zeros)
  assert float(jnp.sum(gradient)) == pytest.approx(3)  # One number a place that is there.
  assert not np.any(gradient[3])


def test_edges_are_finer_towards_the_similar():
  vectors = np.random.default_rng(1).normal(size=(500, 8))
  edges = tail_edges(vectors, 6, seed=0)
  unit = unit_rows(vectors)
  cosines = (unit @ unit.T)[~np.eye(500, dtype=bool)]
  shares = [np.mean(cosines > edge) for edge in edges]
  np.testing.assert_allclose(shares[0], 0.5, atol=0.01)
  np.testing.assert_allclose(shares[-1], 4 / 500, rtol=0.15)
  np.testing.assert_allclose(np.diff(np.log(shares)), np.log(shares[-1] / shares[0]) / 4, rtol=0.2)


@pytest.mark.parametrize("vectors", [np.zeros((3, 2)), np.eye(1, 2), np.ones((4, 2))])
def test_edges_of_nothing_to_compare_are_finite(vectors):
  edges = tail_edges(vectors, 4, seed=0)
  assert edges.shape == (3,)
  assert np.all(np.isfinite(edges))
  assert np.all(edges < 1)


def test_latest_first_keeps_the_last_of_equal_items():
  items = jnp.array([[3, 4, 3, 5, 4, 0], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
  real = jnp.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0], [0] * 6]) > 0
  expected = [[4, 5, 3, -1, -1, -1], [1, -1, -1, -1, -1, -1], [-1] * 6]
  np.testing.assert_array_equal(latest_first(items, real), expected)
