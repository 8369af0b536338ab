"""Neighbours in histories: against counting by hand, in blocks as at once."""

import numpy as np
import pytest

from bbqrec_jax.data import co_occurrence as module
from bbqrec_jax.data.co_occurrence import NEAR, NEXT, PREVIOUS, TOGETHER, co_occurrence, strength_buckets
from bbqrec_jax.data.interactions import from_lengths

ITEMS = 30


@pytest.fixture
def histories():
  rng = np.random.default_rng(0)
  lengths = rng.integers(0, 9, 50)
  return from_lengths(rng.integers(0, ITEMS, lengths.sum()), lengths, np.arange(50).astype(str))


def expected_strengths(histories, pairs):
  counts = np.zeros((ITEMS, ITEMS))
  for user in range(histories.num_users):
    own = histories.history(user)
    for first in range(len(own)):
      for second in range(first + 1, min(len(own), first + pairs.window + 1)):
        share = 1 / (second - first) if pairs.by_distance else 1
        counts[own[first], own[second]] += pairs.forward * share
        counts[own[second], own[first]] += pairs.backward * share
  strengths = counts / np.sqrt(np.outer(counts.sum(1) + 2, counts.sum(0) + 2))
  np.fill_diagonal(strengths, 0)
  return strengths


@pytest.mark.parametrize("at_once", [2**24, 40])
@pytest.mark.parametrize("pairs", [NEAR, TOGETHER, NEXT, PREVIOUS])
def test_neighbours_are_the_strongest_by_counting(histories, pairs, at_once, monkeypatch):
  monkeypatch.setattr(module, "_PAIRS", at_once)
  expected = expected_strengths(histories, pairs)
  neighbours, strengths = co_occurrence(histories, num_items=ITEMS, count=8, pairs=pairs)
  for item in range(ITEMS):
    np.testing.assert_allclose(strengths[item], np.sort(expected[item])[::-1][:8], rtol=1e-5)
    for near, strength in zip(neighbours[item], strengths[item], strict=True):
      assert (near < 0) == (strength == 0)
      assert near < 0 or strength == pytest.approx(expected[item, near], rel=1e-5)


def test_histories_of_single_items_make_no_neighbours():
  alone = from_lengths(np.arange(3), np.ones(3, int), np.array(["a", "b", "c"]))
  neighbours, strengths = co_occurrence(alone, num_items=4, count=2)
  assert np.all(neighbours == -1)
  assert not strengths.any()
  assert not strength_buckets(strengths, 3).any()


def test_buckets_are_of_even_counts(histories):
  _, strengths = co_occurrence(histories, num_items=ITEMS, count=8)
  buckets = strength_buckets(strengths, 4)
  counts = np.bincount(buckets[strengths > 0], minlength=4)
  assert counts.min() > 0.8 * counts.mean()
  assert np.corrcoef(buckets[strengths > 0], strengths[strengths > 0])[0, 1] > 0.7
