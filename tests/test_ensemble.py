"""Runs that rank together, against the product of their probabilities by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from bbqrec_jax.config import default_config
from bbqrec_jax.data.interactions import leave_one_out
from bbqrec_jax.data.ranking import evaluation_batches
from bbqrec_jax.errors import InputError
from bbqrec_jax.layers.apply import apply
from bbqrec_jax.recommender.two_towers import make_recommender
from bbqrec_jax.runs import run as experiment
from bbqrec_jax.runs.restore import restore
from bbqrec_jax.runs.workdir import load_results

pytestmark = pytest.mark.usefixtures("compile_cache")


@pytest.fixture(scope="module")
def script(load_file):
  return load_file("experiments/ensemble.py")


def make_config(**changes):
  config = default_config()
  config.update_from_flattened_dict({
    "partitioner": "single", "data.source": "synthetic", "data.synthetic.num_users": 90,
    "data.synthetic.num_items": 40, "tokenizer.num_levels": 2, "tokenizer.num_codes": 8,
    "tokenizer.kmeans_iterations": 2, "tokenizer.quantizer": "rq_kmeans", "recommender.head": "dense",
    "recommender.item_inputs": ("item",), "recommender.similarity": (), "recommender.width": 8,
    "recommender.mlp_width": 8, "recommender.num_layers": 1, "recommender.steps": 20,
    "recommender.evaluate_every": 10, "evaluation.batch_size": 40,
  })  # fmt: skip
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory, compile_cache):
  folder = tmp_path_factory.mktemp("runs")
  for seed in (0, 1):
    experiment.run(make_config(seed=seed), folder / str(seed))
  return [folder / "0", folder / "1"]


def test_the_product_is_that_of_both_runs(script, runs, tmp_path):
  table = script.judge(runs, tmp_path / "both")
  results, ranks = load_results(tmp_path / "both"), np.load(tmp_path / "both" / "ranks.npz")
  assert f"{results['test']['ndcg@10']:.4f}" in table
  restored = [restore(workdir) for workdir in runs]
  split = leave_one_out(restored[0].dataset.interactions)
  histories, targets = split.history("test"), split.test_target
  total = np.zeros((len(targets), 40))
  for run in restored:
    (batch,) = evaluation_batches(histories, targets, batch_size=len(targets), max_length=run.model.settings.max_length)
    del batch["valid"]
    states = apply(run.model, run.params, "last_states", run.catalogue, batch)
    scores = apply(run.model, run.params, "scores", run.catalogue, states, run.model.seen(batch))
    total += np.asarray(jax.nn.log_softmax(scores, axis=-1), np.float64)
  above = total > np.take_along_axis(total, targets[:, None], axis=1)
  left = above.copy()
  for row in range(len(targets)):
    assert targets[row] not in histories.history(row)
    left[row, histories.history(row)] = False
  for name, expected in (("test", above), ("test_without_history", left)):
    # Rounding may swap two items whose products are all but equal.
    assert np.count_nonzero(ranks[name] != expected.sum(axis=1)) <= 2
  assert np.any(ranks["test"] != np.load(runs[0] / "ranks.npz")["test"])
  assert np.any(ranks["test"] != ranks["test_without_history"])


def test_what_cannot_be_multiplied_is_refused(script, runs, tmp_path, monkeypatch):
  with pytest.raises(InputError, match="exists already: choose another --output"):
    script.judge(runs, runs[0])
  with pytest.raises(InputError, match="makes its own data; leave --data out"):
    script.judge(runs, tmp_path / "out", data=tmp_path)
  with pytest.raises(InputError, match="must be that of a run"):
    script.judge([runs[0], tmp_path], tmp_path / "out")
  experiment.run(make_config(**{"data.synthetic.seed": 1}), tmp_path / "other")
  with pytest.raises(InputError, match="is a run of other data than"):
    script.judge([runs[0], tmp_path / "other"], tmp_path / "out")

  def with_a_head_that_searches(workdir, **options):
    run = restore(workdir, **options)
    return run._replace(model=make_recommender(dataclasses.replace(run.model.settings, head="generative")))

  monkeypatch.setattr(script, "restore", with_a_head_that_searches)
  with pytest.raises(InputError, match="its head searches; give runs whose heads score every item"):
    script.judge(runs, tmp_path / "out")
  assert not (tmp_path / "out").exists()
