"""Ranks by brute force and the metrics in closed form."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.ops.ranking import (
  NDCG_CUTOFFS,
  RECALL_CUTOFFS,
  add_to,
  each_once,
  expected_hits,
  ndcg_at,
  ranking_metrics,
  ranks_in_list,
  recall_at,
  reciprocal_rank,
  target_ranks,
  without,
)

MISS = np.iinfo(np.int32).max


def test_hits_of_ties_in_random_order_are_the_mean_over_their_places():
  rng = np.random.default_rng(8)
  scores = rng.integers(4, size=(40, 15)).astype(np.float32)
  targets = rng.integers(15, size=40)
  own = scores[np.arange(40), targets][:, None]
  before, tied = np.sum(scores > own, axis=1), np.sum(scores == own, axis=1)
  for k in (1, 5, 15):
    expected = [np.mean(b + np.arange(t) < k) for b, t in zip(before, tied, strict=True)]
    assert_allclose(expected_hits(jnp.asarray(scores), jnp.asarray(targets), k=k), expected, rtol=1e-6)
    near = scores + rng.uniform(-0.1, 0.1, size=scores.shape).astype(np.float32)
    found = expected_hits(jnp.asarray(near), jnp.asarray(targets), k=k, tolerance=0.3)
    assert_allclose(found, expected, rtol=1e-6)
  broken = np.where(np.arange(15) == targets[:, None], np.nan, scores)
  assert_array_equal(expected_hits(jnp.asarray(broken), jnp.asarray(targets), k=5), np.zeros(40))
  others = np.where(np.arange(15) == targets[:, None], 9.0, np.nan)
  assert_array_equal(expected_hits(jnp.asarray(others), jnp.asarray(targets), k=14), np.zeros(40))
  assert_array_equal(expected_hits(jnp.asarray(others), jnp.asarray(targets), k=15), np.ones(40))


def test_ranks_equal_a_count_of_the_items_not_below_the_target():
  rng = np.random.default_rng(0)
  scores = rng.integers(6, size=(40, 15)).astype(np.float32)  # Many ties.
  targets = rng.integers(15, size=40)
  expected = [
    sum(scores[b, n] >= scores[b, targets[b]] for n in range(15) if n != targets[b]) for b in range(40)
  ]  # fmt: skip
  ranks = target_ranks(jnp.asarray(scores), jnp.asarray(targets))
  assert_array_equal(ranks, expected)
  assert ranks.dtype == jnp.int32


def test_excluded_scores_are_at_minus_infinity_and_no_others():
  scores = np.random.default_rng(2).normal(size=(3, 5)).astype(np.float32)
  excluded = np.array([[0, 4, -1, -1], [-1, -1, -1, -1], [2, 2, -1, 3]])
  left = np.asarray(without(jnp.asarray(scores), jnp.asarray(excluded)))
  gone = np.array([[1, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 0]], bool)
  assert_array_equal(np.isneginf(left), gone)
  assert_array_equal(left[~gone], scores[~gone])


def test_each_once_keeps_one_of_equal_items():
  items = np.array([[3, 1, 3, -1, 1, 1], [0, 0, 0, 0, 0, 0], [-1, -1, -1, -1, -1, -1], [5, 4, 3, 2, 1, 0]])
  kept = np.asarray(each_once(jnp.asarray(items)))
  assert kept.shape == items.shape
  assert [sorted(row[row >= 0].tolist()) for row in kept] == [[1, 3], [0], [], [0, 1, 2, 3, 4, 5]]


def test_add_to_raises_the_items_that_are_named():
  scores = np.random.default_rng(3).normal(size=(2, 4)).astype(np.float32)
  items = jnp.asarray([[3, -1, 0], [-1, -1, -1]])
  assert_array_equal(add_to(jnp.asarray(scores), items, 1.5) - scores, [[1.5, 0, 0, 1.5], [0, 0, 0, 0]])


def test_ties_count_against_the_target():
  scores = jnp.array([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 2.0, 0.0]])
  assert_array_equal(target_ranks(scores, jnp.array([0, 1])), [3, 1])


def test_nan_scores_rank_the_target_worst_and_never_lift_it():
  nan = np.nan
  scores = jnp.array([[nan, 1.0, 2.0], [nan, nan, nan], [5.0, nan, 1.0], [-jnp.inf, -jnp.inf, 0.0]])
  assert_array_equal(target_ranks(scores, jnp.array([0, 2, 0, 1])), [2, 2, 1, 2])


def test_rank_in_a_list_is_the_targets_place_or_a_miss():
  items = jnp.array([[4, 2, 7], [4, 2, 7], [9, -1, -1], [-1, -1, -1]])
  scores = jnp.array([[0.0, -1.0, -2.0], [0.0, -1.0, -2.0], [-3.0, -np.inf, -np.inf], [-np.inf] * 3])
  assert_array_equal(ranks_in_list(items, scores, jnp.array([7, 3, 9, 0])), [2, MISS, 0, MISS])


def test_rank_in_a_list_counts_ties_and_nan_against_the_target():
  nan, inf = np.nan, np.inf
  items = jnp.array([[4, 2, 7], [4, 2, -1], [4, 2, 7], [4, 2, 7], [4, 2, 7]])
  scores = jnp.array([[0.0, 0.0, -1.0], [0.0, 0.0, -inf], [nan, 0.0, -1.0], [nan, 0.0, -1.0], [-inf, -inf, -inf]])
  assert_array_equal(ranks_in_list(items, scores, jnp.array([4, 2, 2, 4, 2])), [1, 1, 1, MISS, 2])


RANKS = np.array([0, 1, 4, 5, 9, 10, 19, 20, MISS], np.int32)
VALID = np.array([1, 1, 1, 1, 1, 0, 1, 1, 1], bool)


@pytest.mark.parametrize("k", [1, 5, 10, 20, 10**6])
def test_recall_and_ndcg_equal_their_formulas(k):
  kept = RANKS[VALID].astype(np.float64)
  total, count = recall_at(jnp.asarray(RANKS), jnp.asarray(VALID), k)
  assert (total, count) == ((kept < k).sum(), VALID.sum())
  total, count = ndcg_at(jnp.asarray(RANKS), jnp.asarray(VALID), k)
  assert_allclose(total, sum(1 / np.log2(rank + 2) for rank in kept if rank < k), rtol=1e-6)
  assert count == VALID.sum()


def test_reciprocal_rank_equals_its_formula_and_a_miss_counts_zero():
  total, count = reciprocal_rank(jnp.asarray(RANKS), jnp.asarray(VALID))
  assert_allclose(total, sum(1 / (rank + 1.0) for rank in RANKS[VALID].tolist() if rank < MISS), rtol=1e-6)
  assert count == VALID.sum()
  assert reciprocal_rank(jnp.array([MISS]), jnp.ones(1, bool)) == (0, 1)


def test_sums_and_counts_of_two_batches_add_up_to_those_of_both():
  whole = ranking_metrics(jnp.asarray(RANKS), jnp.asarray(VALID))
  parts = [ranking_metrics(jnp.asarray(RANKS[part]), jnp.asarray(VALID[part])) for part in (slice(2), slice(2, None))]
  assert set(whole) == {f"recall@{k}" for k in RECALL_CUTOFFS} | {f"ndcg@{k}" for k in NDCG_CUTOFFS} | {"mrr"}
  for name, pair in whole.items():
    assert_allclose(np.add(parts[0][name], parts[1][name]), pair, rtol=1e-6)


def test_invalid_users_count_nowhere():
  for total, count in ranking_metrics(jnp.asarray(RANKS), jnp.zeros(len(RANKS), bool)).values():
    assert (total, count) == (0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_recall_by_item_is_at_most_recall_by_id_string_and_less_where_ids_collide(seed):
  rng = np.random.default_rng(seed)
  ids = rng.integers(3, size=(20, 2))  # 20 items on at most 9 IDs.
  by_id = rng.normal(size=(50, 3, 3)).astype(np.float32)
  scores = by_id[:, ids[:, 0], ids[:, 1]]  # A model that knows items by ID alone scores namesakes alike.
  targets = rng.integers(20, size=50)
  ranks = target_ranks(jnp.asarray(scores), jnp.asarray(targets))
  lower = []
  for k in (1, 5, 10, 20):
    first = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    by_string = np.mean([(ids[first[b]] == ids[targets[b]]).all(axis=1).any() for b in range(50)])
    total, count = recall_at(ranks, jnp.ones(50, bool), k)
    assert total / count <= by_string
    lower.append(total / count < by_string)
  assert any(lower)
