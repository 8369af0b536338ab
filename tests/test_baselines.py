"""The baselines of other libraries: what they are given, what is chosen, and what they leave."""

import numpy as np
import pytest

from bbqrec_jax.data.interactions import distinct_items, from_lengths, leave_one_out
from bbqrec_jax.runs.compare import compare, systems_of
from bbqrec_jax.utils.json_files import read_json

NUM_ITEMS = 12


@pytest.fixture
def script(load_file):
  return load_file("experiments/peers/baselines.py")


@pytest.fixture
def split():
  rng = np.random.default_rng(0)
  lengths = rng.integers(4, 8, 50)
  items = np.concatenate([rng.choice(NUM_ITEMS, length, replace=False) for length in lengths])
  return leave_one_out(from_lengths(items, lengths, np.arange(50)))


def test_a_ranking_is_that_of_the_scores(script, split):
  table = np.random.default_rng(1).normal(size=(50, NUM_ITEMS)).astype(np.float32)
  history, targets = distinct_items(split.history("test")), split.test_target
  for without in (False, True):
    expected = []
    for user, target in enumerate(targets):
      own = set(history.items[history.offsets[user] : history.offsets[user + 1]].tolist()) if without else set()
      expected.append(sum(table[user, item] > table[user, target] for item in range(NUM_ITEMS) if item not in own))
    options = {"num_items": NUM_ITEMS, "without_history": without}
    found = script.rank(lambda _: lambda users: table[users], split, "test", **options)
    np.testing.assert_array_equal(found.ranks, expected)


def test_the_best_on_validation_is_judged_and_leaves_what_a_run_leaves(script, split, tmp_path, monkeypatch):
  def method(train, num_items, *, seed, sharp):
    assert train is split.train
    wanted = {"validation": split.validation_target, "test": split.test_target}

    def scorer(histories):
      part = "validation" if np.array_equal(histories.items, split.history("validation").items) else "test"
      return lambda users: sharp * (np.arange(num_items) == wanted[part][users][:, None]).astype(np.float32)

    return scorer

  monkeypatch.setitem(script.METHODS, "seer", method)
  monkeypatch.setitem(script.GRIDS, "seer", {"sharp": (-1.0, 1.0, -2.0)})
  figures = {"name": "n", "source": "s", "users": 50, "items": NUM_ITEMS, "interactions": 9, "split": "leave_one_out",
             "split_hash": "h"}  # fmt: skip
  script.judge("seer", split, figures, tmp_path, seeds=[0, 1])
  results = read_json(tmp_path / "seer" / "1" / "results.json")
  assert results["model"] == "seer {'sharp': 1.0}"
  assert results["test"]["ndcg@10"] == 1.0
  assert [one["sharp"] for one in results["tried"]] == [-1.0, 1.0, -2.0]
  _, (row,) = compare(systems_of([tmp_path / "seer" / seed for seed in "01"]), reference="")
  assert (row.seeds, row.without_history) == (2, [1.0, 1.0])


def test_item_knn_adds_up_cosines(script, split):
  pytest.importorskip("implicit")
  owned = script.matrix(split.train, NUM_ITEMS).toarray()
  norms = np.linalg.norm(owned, axis=0)
  cosines = owned.T @ owned / np.maximum(np.outer(norms, norms), 1e-9)
  scorer = script.item_knn(split.train, NUM_ITEMS, neighbours=NUM_ITEMS, weighting="cosine", seed=0)
  history = script.matrix(split.history("test"), NUM_ITEMS).toarray()
  np.testing.assert_allclose(scorer(split.history("test"))(np.arange(5)), history[:5] @ cosines, rtol=1e-4, atol=1e-5)


def test_bpr_learns_who_likes_what(script):
  pytest.importorskip("implicit")
  rng = np.random.default_rng(0)
  items = np.concatenate([rng.choice(6, 5, replace=False) + 6 * (user % 2) for user in range(200)])
  split = leave_one_out(from_lengths(items, np.full(200, 5), np.arange(200)))
  settings = {"factors": 8, "learning_rate": 0.05, "regularization": 0.01, "iterations": 100}
  scorer = script.bpr(split.train, NUM_ITEMS, seed=0, **settings)
  scores = scorer(split.history("test"))(np.arange(200))
  own = np.arange(NUM_ITEMS)[None] // 6 == np.arange(200)[:, None] % 2
  assert scores[own].mean() > scores[~own].mean() + 1
