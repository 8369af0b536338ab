"""The Python API: data in memory goes in, a run comes out, and it answers in the ids of the data."""

import subprocess
import sys

import numpy as np
import pytest
from numpy.testing import assert_allclose

import bbqrec_jax
from bbqrec_jax.serving import recommend

pytestmark = pytest.mark.usefixtures("compile_cache")
NAMES = [f"SKU-{item}" for item in range(30)]


@pytest.fixture(scope="module")
def data():
  """Everybody walks around a ring of 30 items."""
  starts = np.random.default_rng(0).integers(30, size=60)
  columns = {"user": np.repeat([f"U{user}" for user in range(60)], 8),
             "item": [NAMES[(start + step) % 30] for start in starts for step in range(8)]}  # fmt: skip
  return bbqrec_jax.load_data(interactions=columns, items={"id": NAMES})


@pytest.fixture(scope="module")
def config():
  config = bbqrec_jax.preset("sasrec")
  config.update_from_flattened_dict({
    "partitioner": "single", "recommender.width": 32, "recommender.mlp_width": 32, "recommender.num_layers": 1,
    "recommender.dropout": 0.0, "recommender.max_length": 8, "recommender.steps": 150,
    "recommender.evaluate_every": 150, "recommender.optimizer.learning_rate": 1e-2, "evaluation.batch_size": 32,
  })  # fmt: skip
  return config


@pytest.fixture(scope="module")
def run(config, data, tmp_path_factory):
  return bbqrec_jax.run(config, tmp_path_factory.mktemp("run"), data=data)


def test_what_was_learned_is_recommended(run, config):
  assert config.data.source == "directory", "the config that was given is left as it is"
  (found,) = run.recommend([["SKU-3", "SKU-4", "SKU-5"]], k=3)
  assert len(found) == 3
  assert found[0].item == "SKU-6"
  assert found[0].score >= found[1].score


def test_what_is_excluded_or_was_there_does_not_come(run):
  histories = [["SKU-3", "SKU-4", "SKU-5"], ["SKU-5"]]
  found = run.recommend(histories, k=30, exclude=["SKU-6", "SKU-7"])
  for history, row in zip(histories, found, strict=True):
    assert {name for name, _ in row} == set(NAMES) - set(history) - {"SKU-6", "SKU-7"}
  (again,) = run.recommend(histories[:1], k=30, repeat=True)
  assert {name for name, _ in again} == set(NAMES)


def test_users_have_their_histories(run, data):
  users = ["U7", "U3"]
  rows = [data.interactions.users.tolist().index(user) for user in users]
  histories = [[NAMES[item] for item in data.interactions.history(row)] for row in rows]
  for one, other in zip(run.recommend(users=users), run.recommend(histories), strict=True):
    assert [name for name, _ in one] == [name for name, _ in other]
    assert_allclose([score for _, score in one], [score for _, score in other], rtol=1e-5)


def test_requests_of_many_sizes_are_compiled_few_times(run):
  recommend._compiled.cache_clear()
  for count in (1, 2, 3, 5, 9, 1, 16):
    found = run.recommend([["SKU-1", "SKU-2"]] * count)
    assert len(found) == count
  calls = recommend._compiled(run._restored.model)
  assert calls._cache_size() == 4, "two methods, two sizes"


def test_nobody_gets_nothing(run):
  assert run.recommend([]) == []
  assert run.recommend(users=[]) == []


def test_similar_items_are_others(run):
  rows = run.similar(["SKU-4", "SKU-9"], k=40)
  for name, row in zip(("SKU-4", "SKU-9"), rows, strict=True):
    assert {other for other, _ in row} == set(NAMES) - {name}
    scores = [score for _, score in row]
    assert scores == sorted(scores, reverse=True)
    assert max(map(abs, scores)) <= 1 + 1e-5
  assert [name for name, _ in run.similar(["SKU-4"], k=2)[0]] == [name for name, _ in rows[0][:2]]


def test_ranked_again_the_metrics_are_those_of_the_results(run):
  for part, metrics in run.evaluate().items():
    assert metrics == pytest.approx(run.results[part], rel=1e-5), part


def test_a_run_is_read_back_with_its_data(run, data):
  again = bbqrec_jax.load_run(run.workdir, data=data)
  assert again.results == run.results
  assert again.recommend([["SKU-1"]])[0][0].item == run.recommend([["SKU-1"]])[0][0].item
  assert again.semantic_ids == {}
  with pytest.raises(bbqrec_jax.InputError, match=r"load_run with data="):
    bbqrec_jax.load_run(run.workdir)
  other = bbqrec_jax.load_data(interactions={"user": ["a"] * 4, "item": ["x", "y", "z", "x"]})
  with pytest.raises(bbqrec_jax.InputError, match="was trained on"):
    bbqrec_jax.load_run(run.workdir, data=other)


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    ({}, "expected histories or users"),
    ({"histories": [["SKU-1"]], "users": ["U1"]}, "one of the two"),
    ({"histories": [["SKU-1"], ["SKU-1", "SKU-99"]]}, "history 1, place 1: expected the id of an item, got 'SKU-99'"),
    ({"histories": ["SKU-1", "SKU-2"]}, "history 0: expected a list of ids, got 'SKU-1'"),
    ({"histories": [["SKU-1"], []]}, "history 1: expected at least one item"),
    ({"users": ["U99"]}, "got 'U99'; the nearest are"),
    ({"histories": [["SKU-1"]], "exclude": ["nosuch"]}, "exclude, place 0"),
    ({"histories": [["SKU-1"]], "k": 0}, "k of at least 1"),
    ({"histories": [["SKU-1"]], "times": [[1.0, 2.0]]}, "times: expected the second of each item"),
    ({"histories": [["SKU-1", "SKU-2"]], "times": [[2.0, 1.0]]}, "in time order"),
  ],
)  # fmt: skip
def test_a_wrong_request_is_one_line(run, arguments, said):
  with pytest.raises(bbqrec_jax.InputError, match=said):
    run.recommend(**arguments)


def test_importing_the_package_imports_nothing_else():
  code = (
    "import sys, bbqrec_jax\n"
    "assert not {'jax', 'numpy', 'flax'} & set(sys.modules)\n"
    "assert set(bbqrec_jax.__all__) <= set(dir(bbqrec_jax))\n"
    "bbqrec_jax.InputError\n"
    "assert 'jax' not in sys.modules\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("package", [bbqrec_jax, bbqrec_jax.ops, bbqrec_jax.semantic_ids], ids=lambda one: one.__name__)
def test_every_name_of_the_api_is_there(package):
  assert all(callable(getattr(package, name)) and getattr(package, name).__doc__ for name in package.__all__)
  assert set(package.__all__) <= set(dir(package))
  with pytest.raises(AttributeError, match="nosuch"):
    _ = package.nosuch
