"""The comparison of heads: what it trains, what it shares, and its table."""

import numpy as np
import pytest

from bbqrec_jax.errors import InputError
from bbqrec_jax.runs.workdir import PARTS, SHOWN
from bbqrec_jax.utils.json_files import read_json, write_json

CONFIG = """
from bbqrec_jax.config import default_config


def get_config(head="generative"):
  config = default_config()
  config.update_from_flattened_dict({
    "data.source": "synthetic", "data.synthetic.num_users": 60, "data.synthetic.num_items": 40,
    "tokenizer.num_levels": 2, "tokenizer.num_codes": 8, "tokenizer.kmeans_iterations": 2,
    "tokenizer.quantizer": "rq_kmeans", "recommender.head": {"dense": "dense", "sasrec": "dense"}[head],
    "recommender.width": 8, "recommender.mlp_width": 8, "recommender.num_layers": 1, "recommender.num_buckets": 4,
    "recommender.steps": 4, "recommender.evaluate_every": 2, "evaluation.batch_size": 60,
  })
  if head == "sasrec":
    config.recommender.item_inputs = ("item",)
    config.recommender.similarity = ()
  return config
"""


@pytest.fixture
def script(load_file):
  return load_file("experiments/compare_heads.py")


@pytest.fixture
def config_file(tmp_path):
  path = tmp_path / "tiny.py"
  path.write_text(CONFIG)
  return str(path)


def gains_of(folder):
  """The test NDCG@10 of each user."""
  return [1 / np.log2(rank + 2) if rank < 10 else 0 for rank in np.load(folder / "ranks.npz")["test"].tolist()]


@pytest.mark.usefixtures("compile_cache")
def test_systems_share_a_tokenizer_and_the_table_compares_them_user_by_user(script, config_file, tmp_path):
  workdir = tmp_path / "heads"
  systems = ("sasrec", "dense-no_bias", "dense")
  for seed in (0, 1):
    script.do({name: script.load_config(config_file, name, path="", seed=seed) for name in systems}, workdir)
  assert len(list(workdir.glob("**/semantic_ids.json"))) == 2, "one tokenizer a seed"
  fingerprints = [read_json(workdir / name / "0" / "recommender.json") for name in systems[1:]]
  assert fingerprints[0] == fingerprints[1]
  assert read_json(workdir / "dense-no_bias" / "0" / "run.json")["recommender.similarity"] == []
  assert read_json(workdir / "dense" / "0" / "run.json")["recommender.similarity"] != []

  report = script.report(workdir, reference="sasrec")
  rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines()
          if line.startswith("| ")}  # fmt: skip
  assert set(rows) == {"system", *systems}
  gains = {}
  for name in systems:
    results = [read_json(workdir / name / seed / "results.json") for seed in "01"]
    values = [result["test"]["ndcg@10"] for result in results]
    assert rows[name][5] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
    gains[name] = [gains_of(workdir / name / seed) for seed in "01"]
    assert np.mean(gains[name]) == pytest.approx(np.mean(values), rel=1e-5)
  paired = np.mean(gains["dense"], axis=0) - np.mean(gains["sasrec"], axis=0)
  interval = 1.96 * np.std(paired, ddof=1) / np.sqrt(60)
  assert rows["dense"][6] == f"{np.mean(paired):+.4f} ± {interval:.4f}"
  assert rows["sasrec"][6] == ""


@pytest.mark.parametrize("data", ["scientific", "beauty"])
def test_the_documented_table_is_that_of_the_records(script, request, data):
  folder = request.config.rootpath / "experiments" / "records" / "heads" / data
  systems = {path.name for path in folder.iterdir()}
  assert {"sasrec", "generative", "dense"} <= systems <= set(script.SHOWN)
  report = script.report(folder, reference="sasrec")
  head, *_ = report.splitlines()
  shown = (request.config.rootpath / "docs" / "results" / f"{data}.md").read_text(encoding="utf-8")
  assert head in shown
  rows = [line.split("|")[1:-3] for line in report.splitlines() if line.startswith("| ")]
  assert len(rows) == 1 + len(systems)
  for row in rows:
    assert f"|{'|'.join(row)}|" in shown, row


def test_results_of_nothing_and_of_two_data_sets_are_refused(script, tmp_path):
  with pytest.raises(InputError, match=r"expected SYSTEM/SEED/results\.json"):
    script.report(tmp_path, reference="sasrec")
  for seed, name in (("0", "one"), ("1", "other")):
    path = tmp_path / "dense" / seed / "results.json"
    path.parent.mkdir(parents=True)
    part = dict.fromkeys(SHOWN, 0.5)
    data = {"name": name, "users": 1, "items": 2, "interactions": 3, "split_hash": name}
    results = {"model": "m", "data": data, **dict.fromkeys(PARTS, part), "best_step": 2, "steps": 2}
    write_json(path, results | {"seconds": {"recommender": 1.0, "evaluation": 1.0}})
  with pytest.raises(InputError, match="different data sets"):
    script.report(tmp_path, reference="sasrec")
  write_json(path, {name: value for name, value in read_json(path).items() if name != "test_without_history"})
  with pytest.raises(InputError, match=r"test_without_history.*makes it again"):
    script.report(tmp_path, reference="sasrec")


def test_what_cannot_be_a_config_is_said(script, config_file):
  with pytest.raises(InputError, match="expected a config with a choice of heads"):
    script.load_config("nowhere.py", "dense", path="", seed=0)
  with pytest.raises(InputError, match="no config for 'parallel'"):
    script.load_config(config_file, "parallel", path="", seed=0)
