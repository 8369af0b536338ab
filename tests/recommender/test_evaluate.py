"""Full-catalogue ranking of all users against plain NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bbqrec_jax.data.interactions import from_lengths, leave_one_out
from bbqrec_jax.recommender.catalogue import Catalogue
from bbqrec_jax.recommender.evaluate import (
  evaluate,
  make_ranker,
  popularity_metrics,
  rank_held_out,
  rank_scores,
  sample_users,
  summarize,
  with_and_without,
)
from bbqrec_jax.recommender.model import Recommender
from bbqrec_jax.recommender.settings import RecommenderSettings

NUM_ITEMS, MAX_LENGTH = 30, 6
MISS = np.iinfo(np.int32).max


def make_split(num_users=23, *, seed=0):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(3, 15, num_users)
  items = (NUM_ITEMS * rng.random(lengths.sum()) ** 2).astype(np.int64)
  return leave_one_out(from_lengths(items, lengths, np.arange(num_users).astype(str)))


def metrics_of(ranks):
  """The documented metrics of ranks counted from 0, in plain Python."""
  users = len(ranks)
  result = {f"recall@{k}": sum(rank < k for rank in ranks) / users for k in (1, 5, 10, 20)}
  for k in (5, 10, 20):
    result[f"ndcg@{k}"] = sum(1 / math.log2(rank + 2) for rank in ranks if rank < k) / users
  return result | {"mrr": sum(1 / (rank + 1) for rank in ranks if rank < MISS) / users}


def assert_metrics(actual, expected):
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    # Sums of float32.
    assert actual[name] == pytest.approx(value, rel=2e-6, abs=1e-9), name


def test_summarize():
  ranks = [0, 0, 1, 4, 5, 9, 10, 19, 20, 1000, MISS]
  assert_metrics(summarize(np.array(ranks, np.int32)), metrics_of(ranks))


def test_summarize_extremes():
  assert set(summarize(np.zeros(3, np.int32)).values()) == {1.0}
  assert set(summarize(np.full(3, MISS, np.int32)).values()) == {0.0}
  assert summarize(np.array([4], np.int32))["ndcg@5"] == pytest.approx(1 / math.log2(6), rel=1e-6)
  assert summarize(np.array([5], np.int32))["ndcg@5"] == 0.0


@pytest.mark.parametrize("stage", ["validation", "test"])
def test_dense_evaluation_against_brute_force(stage):
  split = make_split()
  histories = split.history(stage)
  targets = split.validation_target if stage == "validation" else split.test_target
  model = Recommender(
    RecommenderSettings(
      num_items=NUM_ITEMS, head="dense", width=8, num_layers=1, mlp_width=8,
      max_length=MAX_LENGTH, seen_item_bias=False, cosine=False,
    )
  )  # fmt: skip
  catalogue = Catalogue(
    jnp.zeros((NUM_ITEMS, 0), jnp.int32), jnp.zeros((NUM_ITEMS, 0), jnp.int32), jnp.zeros((NUM_ITEMS, 0, 1)),
    jnp.zeros((0, 31)),
  )  # fmt: skip
  # Histories written out by hand, all users in one batch, padded further than the model's longest.
  users = histories.num_users
  batch = {name: np.zeros((users, 2 * MAX_LENGTH), np.int32) for name in ("items", "segments", "positions", "targets")}
  for user in range(users):
    last = histories.history(user)[-MAX_LENGTH:]
    batch["items"][user, : len(last)] = last
    batch["segments"][user, : len(last)] = 1
    batch["positions"][user, : len(last)] = np.arange(len(last))
  params = jax.jit(model.init)(jax.random.key(0), catalogue, batch)["params"]
  rng = np.random.default_rng(1)
  params = jax.tree.map(
    lambda leaf: np.asarray(leaf) + rng.normal(scale=0.5, size=leaf.shape).astype(np.float32), params
  )
  # Two items that are exactly alike tie for everybody.
  params["item_embedding"][5] = params["item_embedding"][0]

  states = np.asarray(
    jax.jit(lambda params: model.apply({"params": params}, catalogue, batch, method="last_states"))(params), np.float64
  )
  scores = states @ np.asarray(params["item_embedding"], np.float64).T
  ranks, firsts = [], set()
  for user in range(users):
    others = np.delete(scores[user], targets[user])
    ranks.append(int(np.sum(others >= scores[user, targets[user]])))
    firsts.update(np.argsort(-scores[user], kind="stable")[:10].tolist())
  assert {0, 5} & set(targets.tolist()), "a tied target must occur"

  whole = evaluate(
    jax.jit(make_ranker(model, beam_width=1)),
    params,
    catalogue,
    histories,
    targets,
    batch_size=10,
    max_length=MAX_LENGTH,
    num_items=NUM_ITEMS,
  )
  assert_metrics(whole.metrics, metrics_of(ranks) | {"coverage@10": len(firsts) / NUM_ITEMS})
  assert whole.ranks.tolist() == ranks
  assert whole.without_history is None

  # Once more without what each user has had: the whole history, which is longer than what the model is shown.
  ranks, firsts = [], set()
  for user in range(users):
    seen = set(histories.history(user).tolist())
    left = [item for item in range(NUM_ITEMS) if item not in seen]
    better = sum(scores[user, item] >= scores[user, targets[user]] for item in left if item != targets[user])
    ranks.append(int(better) if targets[user] in left else MISS)
    firsts.update(sorted(left, key=lambda item: -scores[user, item])[:10])
  assert 0 < ranks.count(MISS) < users
  assert max(histories.lengths) > MAX_LENGTH
  result = evaluate(
    jax.jit(make_ranker(model, beam_width=1)), params, catalogue, histories, targets, batch_size=10,
    max_length=MAX_LENGTH, num_items=NUM_ITEMS, without_history=True,
  )  # fmt: skip
  assert result.ranks.tolist() == whole.ranks.tolist()
  assert result.metrics == whole.metrics
  assert_metrics(result.without_history.metrics, metrics_of(ranks) | {"coverage@10": len(firsts) / NUM_ITEMS})
  assert result.without_history.ranks.tolist() == ranks


def test_rankings_with_and_without_the_history_have_one_shape():
  split, shapes, left_out = make_split(), set(), []

  def ranker(params, shared, batch):
    shapes.add(tuple(sorted((name, array.shape) for name, array in batch.items())))
    left_out.append(int(np.sum(batch["exclude"] >= 0)))
    found = {"ranks": batch["targets"], "top": np.zeros((len(batch["targets"]), 10), np.int32)}
    return found | {f"{name}_without_history": part + 1 for name, part in found.items()}

  rank = functools.partial(
    evaluate, ranker, None, None, batch_size=30, max_length=MAX_LENGTH, num_items=NUM_ITEMS, width=16
  )
  rankings = rank_held_out(rank, split)
  assert list(rankings) == ["validation", "test", "validation_without_history", "test_without_history"]
  assert rankings["test"].ranks.tolist() == split.test_target.tolist()
  assert rankings["test_without_history"].ranks.tolist() == (split.test_target + 1).tolist()
  rank(split.train, split.validation_target)
  assert len(shapes) == 1
  distinct = [sum(map(len, map(set, map(split.history(part).history, range(23))))) for part in ("validation", "test")]
  assert left_out == [*distinct, 0]


def test_a_ranking_without_items_costs_one_only_where_some_are_left_out():
  scores, targets = jnp.array([[1.0, 3.0, 2.0, 0.0]] * 2), jnp.array([2, 0])
  called = []

  def rank(exclude):
    jax.debug.callback(lambda: called.append(1))
    return rank_scores(scores, targets, exclude)

  both = jax.jit(lambda exclude: with_and_without(rank, exclude))
  found = both(jnp.array([[1, -1], [0, -1]]))
  assert found["ranks"].tolist() == [1, 2]
  assert found["ranks_without_history"].tolist() == [0, MISS]
  assert found["top_without_history"].tolist() == [[2, 0, 3, -1], [1, 2, 3, -1]]
  jax.effects_barrier()
  assert len(called) == 2
  assert both(jnp.full((2, 2), -1))["ranks"].tolist() == [1, 2]
  jax.effects_barrier()
  assert len(called) == 3


@pytest.mark.parametrize("bounds", [(), (2, 4)])
@pytest.mark.parametrize("batch_size", [1, 7, 23, 100])
def test_evaluate_joins_batches_and_counts_coverage(batch_size, bounds):
  split = make_split()
  users, histories = split.train.num_users, split.train
  # What the ranker says depends on the user alone, whom it knows by the target.
  targets = np.arange(users)
  ranks = np.where(np.arange(users) % 5 == 4, MISS, np.arange(users) * 2)
  top = np.array([[user % 7, (user + 1) % 7, *([-1] * 8)] for user in range(users)])
  given = []

  def ranker(params, shared, batch):
    assert params == "params"
    assert shared == "shared"
    assert batch.keys() == {"items", "segments", "positions", "targets"}
    longest = batch["segments"].sum(axis=1).max()
    assert batch["items"].shape == (batch_size, next(bound for bound in (*bounds, MAX_LENGTH) if bound >= longest))
    given.extend(batch["targets"][np.append(True, np.diff(batch["targets"]) != 0)])
    # A row that only fills the batch repeats a user; what is said of it must not count.
    fresh = np.concatenate([[True], np.diff(batch["targets"]) != 0])
    return {
      "ranks": np.where(fresh, ranks[batch["targets"]], 0),
      "top": np.where(fresh[:, None], top[batch["targets"]], 29),
    }

  result = evaluate(
    ranker, "params", "shared", histories, targets, batch_size=batch_size, max_length=MAX_LENGTH, num_items=NUM_ITEMS,
    bounds=bounds,
  )  # fmt: skip
  assert sorted(given) == targets.tolist()
  # Users of about one length are together.
  lengths = np.minimum(histories.lengths, MAX_LENGTH)
  assert given == np.argsort(lengths, kind="stable").tolist()
  assert_metrics(result.metrics, metrics_of(ranks.tolist()) | {"coverage@10": 7 / NUM_ITEMS})
  assert result.ranks.tolist() == ranks.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_popularity_against_brute_force_with_ties_against_the_target(seed):
  split = make_split(seed=seed)
  counts = [int(np.sum(split.train.items == item)) for item in range(NUM_ITEMS)]
  assert len(set(counts)) < NUM_ITEMS, "ties must occur"
  for targets in (split.validation_target, split.test_target):
    ranks = [
      sum(counts[other] >= counts[target] for other in range(NUM_ITEMS) if other != target)
      for target in targets.tolist()
    ]
    expected = metrics_of(ranks) | {"coverage@10": 10 / NUM_ITEMS}
    assert_metrics(popularity_metrics(split, targets, num_items=NUM_ITEMS), expected)


@pytest.mark.parametrize("seed", range(3))
def test_popularity_without_the_history_of_each_user(seed):
  split = make_split(seed=seed)
  counts = [int(np.sum(split.train.items == item)) for item in range(NUM_ITEMS)]
  for stage, targets in (("validation", split.validation_target), ("test", split.test_target)):
    histories, ranks, firsts = split.history(stage), [], set()
    for user, target in enumerate(targets.tolist()):
      seen = set(histories.history(user).tolist())
      left = [item for item in range(NUM_ITEMS) if item not in seen]
      better = sum(counts[other] >= counts[target] for other in left if other != target)
      ranks.append(better if target in left else MISS)
      firsts.update(sorted(left, key=lambda item: -counts[item])[:10])
    assert 0 < ranks.count(MISS) < len(ranks)
    expected = metrics_of(ranks) | {"coverage@10": len(firsts) / NUM_ITEMS}
    assert expected["coverage@10"] > 10 / NUM_ITEMS
    assert_metrics(popularity_metrics(split, targets, num_items=NUM_ITEMS, histories=histories), expected)


def test_popularity_of_a_catalogue_of_equals_ranks_every_target_last():
  items = np.array([0, 1, 2, 3, 0, 1, 2, 3, 0, 1])
  split = leave_one_out(from_lengths(np.concatenate([items[:4], items[2:6]]), np.array([4, 4]), np.array(["a", "b"])))
  np.testing.assert_array_equal(np.bincount(split.train.items), [1, 1, 1, 1])
  metrics = popularity_metrics(split, split.test_target, num_items=4)
  assert metrics["mrr"] == pytest.approx(1 / 4)
  assert metrics["recall@1"] == 0.0
  assert metrics["coverage@10"] == 1.0


def test_sample_users():
  split = make_split()
  np.testing.assert_array_equal(sample_users(split, 0, seed=0), np.arange(23))
  np.testing.assert_array_equal(sample_users(split, 23, seed=0), np.arange(23))
  np.testing.assert_array_equal(sample_users(split, 50, seed=0), np.arange(23))
  chosen = sample_users(split, 9, seed=0)
  assert len(set(chosen.tolist())) == 9
  np.testing.assert_array_equal(chosen, np.sort(chosen))
  assert set(chosen.tolist()) <= set(range(23))
  np.testing.assert_array_equal(chosen, sample_users(split, 9, seed=0))
  assert chosen.tolist() != sample_users(split, 9, seed=1).tolist()
