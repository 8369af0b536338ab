"""Residual k-means on clusters that are known, over blocks and memory maps."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.ops.kmeans import _lloyd, residual_kmeans

NUM_POINTS = 120


@pytest.fixture(scope="module")
def clusters():
  """Points [80, 2] of four clusters far apart, their labels, and the clusters' means."""
  rng = np.random.default_rng(3)
  labels = rng.permutation(np.repeat(np.arange(4), 20))
  points = np.array([[9, 0], [0, 9], [-9, 0], [0, -9]])[labels] + rng.normal(scale=0.3, size=(80, 2))
  return points.astype(np.float32), labels, np.stack([points[labels == label].mean(axis=0) for label in range(4)])


def cluster(points, *, seed=0, weights=None, **options):
  """Four-means, [4, 2]."""
  return residual_kmeans(seed, points, num_levels=1, num_codes=4, weights=weights, **options)[0]


def nearest(points, centres):
  return np.square(points[:, None].astype(np.float64) - centres[None]).sum(axis=-1).argmin(axis=1)


def in_order(rows):
  rows = np.asarray(rows)
  return rows[np.lexsort(np.round(rows).T)]


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_well_separated_clusters(clusters, seed):
  points, labels, means = clusters
  centres = cluster(points, seed=seed)
  assert centres.dtype == np.float32
  assert_allclose(in_order(centres), in_order(means), atol=1e-3)
  assert_allclose(centres[nearest(points, centres)], means[labels], atol=1e-3)


def test_centres_are_weighted_means(clusters):
  points, labels, _ = clusters
  weights = 1.0 + np.arange(80) % 7
  expected = [np.average(points[labels == label], axis=0, weights=weights[labels == label]) for label in range(4)]
  assert_allclose(in_order(cluster(points, weights=weights)), in_order(expected), atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("garbage", [1000.0, np.nan])
def test_rows_of_weight_zero_take_no_part(clusters, seed, garbage):
  points, _, means = clusters
  rows = garbage * np.random.default_rng(6).normal(size=(40, 2)).astype(np.float32)
  weights = np.concatenate([np.zeros(40), np.ones(80)])
  centres = cluster(np.concatenate([rows, points]), seed=seed, weights=weights)
  assert_allclose(in_order(centres), in_order(means), atol=1e-3)


def test_with_fewer_distinct_points_than_codes_there_is_a_centre_on_each_and_none_elsewhere():
  points = np.array([[4, 4], [4, 4], [3, 1], [3, 1], [-2, 5]], np.float32)
  (centres,) = residual_kmeans(0, points, num_levels=1, num_codes=8)
  assert_array_equal(centres[nearest(points, centres)], points)
  assert_array_equal(points[nearest(centres, points)], centres)


@pytest.mark.parametrize("block", [7, 3])
def test_emptied_clusters_take_the_points_that_are_farthest_from_their_centres(block):
  points = np.array([[0, 1], [0, -1], [8, 0], [1, 0], [0, -6], [-1, 0], [0, 99]], np.float32)
  weights = np.array([1, 1, 1, 1, 1, 1, 0], np.float32)
  centres = np.array([[50, 50], [0, 0], [-70, 0]], np.float32)
  blocks = [(points[first : first + block], weights[first : first + block]) for first in range(0, 7, block)]
  moved = _lloyd(blocks, None, jnp.asarray(centres), live=6)
  assert_allclose(moved, [[8, 0], points[:6].mean(axis=0), [0, -6]], rtol=1e-6)


@pytest.mark.parametrize("block", [50, 7, 1])
def test_in_blocks_it_finds_what_it_finds_at_once(block):
  points = np.random.default_rng(7).normal(size=(NUM_POINTS, 2)).astype(np.float32)
  weights = 1.0 + np.arange(NUM_POINTS) % 3
  options = {"num_levels": 2, "num_codes": 4, "weights": weights, "iterations": 6}
  assert_allclose(residual_kmeans(0, points, block=block, **options), residual_kmeans(0, points, **options), atol=1e-5)


def test_seeds_from_a_sample_and_points_on_disk_find_the_clusters_too(clusters, tmp_path):
  points, _, means = clusters
  np.save(tmp_path / "points.npy", points.astype(np.float16))
  mapped = np.load(tmp_path / "points.npy", mmap_mode="r")
  assert_allclose(in_order(cluster(mapped, sample=40, block=32)), in_order(means), atol=5e-3)


def test_mean_squared_residual_falls_with_each_level():
  points = np.random.default_rng(8).normal(size=(96, 4)).astype(np.float32)
  codebooks = residual_kmeans(0, points, num_levels=3, num_codes=6).astype(np.float64)
  assert codebooks.shape == (3, 6, 4)
  residual = points.astype(np.float64)
  energies = [np.square(residual).sum(axis=1).mean()]
  for centres in codebooks:
    residual = residual - centres[nearest(residual, centres)]
    energies.append(np.square(residual).sum(axis=1).mean())
  assert (np.diff(energies) < 0).all(), energies


def test_no_point_with_a_weight_is_refused():
  with pytest.raises(ValueError, match="at least one point with a weight above 0"):
    cluster(np.zeros((5, 2), np.float32), weights=np.zeros(5))
