"""The comparison of tokenizers: what it trains, what it leaves alone, and its tables."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from bbqrec_jax.config import default_config
from bbqrec_jax.data.interactions import Split, from_lengths
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.utils.json_files import read_json


@pytest.fixture(scope="module")
def script(load_file):
  return load_file("experiments/compare_tokenizers.py")


@pytest.fixture(scope="module")
def config():
  config = default_config()
  config.update_from_flattened_dict({
    "data.source": "synthetic", "data.synthetic.num_users": 60, "data.synthetic.num_items": 40,
    "tokenizer.num_levels": 2, "tokenizer.num_codes": 8, "tokenizer.kmeans_iterations": 2, "recommender.head": "dense",
    "recommender.width": 8, "recommender.mlp_width": 8, "recommender.num_layers": 1, "recommender.similarity": (),
    "recommender.steps": 4, "recommender.evaluate_every": 2, "evaluation.batch_size": 60,
  })  # fmt: skip
  return config


@pytest.mark.usefixtures("compile_cache")
def test_each_seed_gets_a_tokenizer_and_a_recommender_and_the_report_means_over_them(script, config, tmp_path):
  script.do(config, tmp_path, variants=["rq_kmeans"], seeds=[0, 1], recommender=True, ids_alone=True)
  results = [read_json(tmp_path / "rq_kmeans" / seed / "dense" / "results.json") for seed in ("0", "1")]
  healths = [read_json(tmp_path / "rq_kmeans" / seed / "tokenizer" / "health.json") for seed in ("0", "1")]
  assert results[0]["test"] != results[1]["test"], "two seeds, two runs"
  written = (tmp_path / "rq_kmeans" / "0" / "dense" / "results.json").stat().st_mtime_ns
  script.do(config, tmp_path, variants=["rq_kmeans"], seeds=[0], recommender=True, ids_alone=True)
  assert (tmp_path / "rq_kmeans" / "0" / "dense" / "results.json").stat().st_mtime_ns == written, "done already"

  report = script.report(config, tmp_path)
  rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("| rq")]
  health, metrics, alone = rows
  assert (metrics[1], alone[1]) == ("dense", "ids_alone")
  assert health[1] == metrics[2] == "2"
  cohesion = [100 * health["cohesion"]["level1"] for health in healths]
  assert health[5] == f"{np.mean(cohesion):.1f} ± {np.std(cohesion, ddof=1):.1f}"
  in_training = [100 * health["cohesion"]["training1"] for health in healths]
  assert health[7] == f"{np.mean(in_training):.1f} ± {np.std(in_training, ddof=1):.1f}"
  assert health[10:] == [""] * 4, "no sequence model, no probe of one, no specific encoders"
  ndcg = [result["test"]["ndcg@10"] for result in results]
  assert metrics[6] == f"{np.mean(ndcg):.4f} ± {np.std(ndcg, ddof=1):.4f}"
  assert len(metrics) == 7


@pytest.mark.usefixtures("compile_cache")
def test_every_tokenizer_can_be_probed_and_the_report_means_over_them(script, config, tmp_path, monkeypatch):
  asked, train = [], script.train_probe

  def train_probe(config, vectors, split):
    asked.append((config.seed, vectors))
    return train(config, vectors, split, steps=4, evaluate_every=2)

  monkeypatch.setattr(script, "train_probe", train_probe)

  def do(seed, *, sequence_recall):
    variants, others = ["rq_kmeans"], {"recommender": False, "ids_alone": False}
    script.do(config, tmp_path, variants=variants, seeds=[seed], sequence_recall=sequence_recall, **others)
    report = script.report(config, tmp_path)
    head, row = [line.split("|")[1:-1] for line in report.splitlines() if line.startswith(("| tokenizer", "| rq"))]
    return dict(zip(map(str.strip, head), map(str.strip, row), strict=True))

  folders = [tmp_path / "rq_kmeans" / seed for seed in ("0", "1")]
  do(0, sequence_recall=True)
  assert not list(tmp_path.glob("*/*/*/results.json")), "no recommender was asked for"
  row = do(1, sequence_recall=False)
  assert (row["seeds"], row["S2I Recall@10, frozen"], row["on test"]) == ("2", "", ""), "one of two is not there yet"
  do(0, sequence_recall=True)
  row = do(1, sequence_recall=True)
  assert [seed for seed, _ in asked] == [0, 1], "done already"
  for folder, (_, vectors) in zip(folders, asked, strict=True):
    assert_array_equal(vectors, SemanticIds.load(folder / "tokenizer").vectors("fused"))
  found = [read_json(folder / "sequence_recall.json") for folder in folders]
  for part, column in (("validation", "S2I Recall@10, frozen"), ("test", "on test")):
    values = [one[part] for one in found]
    assert row[column] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
  assert {one["step"] for one in found} <= {2, 4}


def test_ids_made_elsewhere_are_measured_by_hand_counted_figures(script):
  codes = np.array([[0, 0], [0, 1], [1, 0], [1, 0]])
  train = from_lengths(np.array([0, 1, 2, 3]), np.array([2, 2]), np.array(["a", "b"]))
  split = Split(train, np.array([0, 2], np.int32), np.array([0, 0], np.int32), "hash")
  health = script.measure(codes, split)
  # Item 1 then 0: one code shared. Item 3 then 2: both.
  assert (health["cohesion"]["level1"], health["cohesion"]["level2"]) == (1.0, 0.5)
  # In training 0 then 1, which share one code, and 2 then 3, which share both.
  assert (health["cohesion"]["training1"], health["cohesion"]["training2"]) == (1.0, 0.5)
  assert health["collision_rate_before"] == 0.25
  assert health["usage"] == [1.0, 1.0]
