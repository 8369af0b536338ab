"""A grid of runs: what it trains, what its systems share, its records and tables, and what it refuses."""

import re

import numpy as np
import pytest

from bbqrec_jax.errors import InputError
from bbqrec_jax.runs import grid
from bbqrec_jax.runs.compare import compare, systems_of, to_markdown
from bbqrec_jax.runs.workdir import PARTS, SHOWN
from bbqrec_jax.utils.json_files import read_json, write_json

TINY = """
from bbqrec_jax.config import default_config


def get_config(head="dense"):
  config = default_config()
  config.update_from_flattened_dict({
    "tokenizer.num_levels": 2, "tokenizer.num_codes": 8, "tokenizer.kmeans_iterations": 2,
    "tokenizer.quantizer": "rq_kmeans", "recommender.head": {"dense": "dense"}[head], "recommender.width": 8,
    "recommender.mlp_width": 8, "recommender.num_layers": 1, "recommender.num_buckets": 4, "recommender.steps": 4,
    "recommender.evaluate_every": 2, "evaluation.batch_size": 60,
  })
  return config
"""


@pytest.fixture
def tiny(tmp_path):
  path = tmp_path / "tiny.py"
  path.write_text(TINY)
  return str(path)


@pytest.fixture
def shop(tmp_path):
  """A data set of 60 users."""
  folder, rng = tmp_path / "shop", np.random.default_rng(0)
  folder.mkdir()
  lines = [" ".join(map(str, [user, *rng.choice(40, 6, replace=False)])) for user in range(60)]
  (folder / "sequences.txt").write_text("\n".join(lines) + "\n")
  (folder / "items.jsonl").write_text("{}\n" * 40)
  np.save(folder / "text_features.npy", rng.normal(size=(40, 5)).astype(np.float32))
  return folder


@pytest.fixture
def trained(monkeypatch):
  """Stands for training: (workdir, config) of every run and of every tokenizer, in the order in which they came."""
  runs, tokenizers = [], []

  def run(config, folder):
    runs.append((folder, config.copy_and_resolve_references()))
    rng = np.random.default_rng([config.seed, config.recommender.width])
    ranks = rng.integers(0, 20, 60)
    part = dict.fromkeys(SHOWN, float(np.mean(np.where(ranks < 10, 1 / np.log2(ranks + 2), 0))))
    data = {"name": "shop", "users": 60, "items": 40, "interactions": 360, "split_hash": "s"}
    results = {"model": "m", "data": data, **dict.fromkeys(PARTS, part), "best_step": 2, "steps": 4, "parameters": 1234,
               "seconds": {"recommender": 30.0, "evaluation": 30.0}}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    np.savez(folder / "ranks.npz", test=ranks)
    return results

  monkeypatch.setattr(grid, "run", run)
  monkeypatch.setattr(grid, "tokenize", lambda config, folder: tokenizers.append((folder, config)))
  monkeypatch.setattr("jax.clear_caches", lambda: None)
  return runs, tokenizers


def test_systems_share_a_tokenizer_and_the_table_compares_them(tiny, shop, tmp_path, trained):
  texts = (
    f"ids: {tiny} recommender.item_inputs=('item',) recommender.similarity=()",
    f"wide: {tiny} recommender.width=16 evaluation.beam_width=9",
    f"dense: {tiny}:dense",
    f"codes: {tiny} tokenizer.num_codes=16",
  )
  systems = [grid.parse_system(text) for text in texts]
  assert [system.name for system in systems] == ["ids", "wide", "dense", "codes"]
  tables = grid.run_grid(systems, {"shop": shop}, [0, 1], tmp_path / "grid", records=tmp_path / "records")
  runs, tokenizers = trained
  folder = tmp_path / "grid" / "shop"
  assert [run[0] for run in runs] == [folder / system.name / seed for seed in "01" for system in systems]
  assert all(config.data.path == str(shop) and config.data.source == "directory" for _, config in runs)
  artefacts = [config.tokenizer.artefact for _, config in runs]
  assert artefacts[0] == "" == artefacts[4], "nothing semantic, no tokenizer"
  assert artefacts[1] == artefacts[2] != artefacts[3], "configured alike, shared"
  assert len(set(artefacts)) == 5, "and one of each for every seed"
  assert {str(folder / "tokenizer") for folder, _ in tokenizers} == set(artefacts) - {""}
  assert {config.seed for _, config in tokenizers} == {0, 1}
  few = grid.parse_system(f"few: {tiny} recommender.candidate_similarity.users=7")
  grid.run_grid([few], {"shop": shop}, [0], tmp_path / "few")
  assert tokenizers[-1][1].recommender.candidate_similarity.users == 7, "what is held out, the tokenizer does not see"

  results = read_json(folder / "dense" / "1" / "results.json")
  record = read_json(tmp_path / "records" / "shop-dense-1.json")
  assert record["test"] == results["test"]
  assert (record["system"], record["seed"], record["split_hash"], record["parameters"]) == ("dense", 1, "s", 1234)
  assert record["config"]["recommender.width"] == 8
  assert str(tmp_path) not in str(record), "a record says nothing of the machine's folders"
  rows = dict(re.findall(r"^\| (\w+) \| 2 \|(.*)\|$", tables["shop"], re.MULTILINE))
  assert list(rows) == ["ids", "wide", "dense", "codes"]
  values = [read_json(folder / "dense" / seed / "results.json")["test"]["ndcg@10"] for seed in "01"]
  assert f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" in rows["dense"]
  assert rows["dense"].endswith(f" 1,234 | {np.mean(values):.4f} ± {np.std(values, ddof=1):.4f} ")


def test_data_that_is_not_there_is_said_before_anything_is_trained(tiny, shop, tmp_path, trained):
  with pytest.raises(InputError, match="expected a folder of data"):
    grid.run_grid([grid.parse_system(f"a: {tiny}")], {"shop": shop, "no": tmp_path / "no"}, [0], tmp_path / "grid")
  assert trained == ([], [])


@pytest.mark.usefixtures("compile_cache")
def test_what_is_done_is_not_done_again(tiny, shop, tmp_path, monkeypatch):
  system = grid.parse_system(f"ids: {tiny} recommender.item_inputs=('item',) recommender.similarity=()")
  table = grid.run_grid([system], {"shop": shop}, [0], tmp_path / "grid")
  assert "| ids | 1 |" in table["shop"]
  monkeypatch.setattr("bbqrec_jax.runs.run._train", None)  # Nothing is left to train.
  assert grid.run_grid([system], {"shop": shop}, [0], tmp_path / "grid") == table


@pytest.mark.parametrize(
  ("text", "says"),
  [
    ("nothing", "expected one of the presets"),
    ("dense recommender.width=9", "changes need a name"),
    ("x: dense recommender.wide=9", "'recommender.wide=9' suits no field"),
    ("x: dense recommender.width=wide", "suits no field"),
    ("a/b: dense", "expected a name of letters"),
    ("7: dense", "expected a name of letters"),
    ("x: nowhere.py", "expected a preset or a config file, got 'nowhere.py'"),
  ],
)
def test_what_is_no_system_is_said(text, says):
  with pytest.raises(InputError, match=re.escape(says)):
    grid.parse_system(text)


def test_a_choice_that_a_file_has_not_and_names_twice_are_said(tiny, shop, tmp_path):
  with pytest.raises(InputError, match="no config 'parallel'"):
    grid.parse_system(f"x: {tiny}:parallel")
  for names in (("dense", "dense"), ("tokenizers: dense",)):
    with pytest.raises(InputError, match="a name of its own"):
      grid.run_grid([grid.parse_system(name) for name in names], {"shop": shop}, [0], tmp_path / "grid")
  assert not (tmp_path / "grid").exists()


@pytest.mark.parametrize("data", ["scientific", "beauty"])
def test_the_documented_table_is_that_of_the_records(request, data):
  folder = request.config.rootpath / "experiments" / "records" / "heads" / data
  systems = systems_of(sorted(folder.glob("*/*")))
  assert {"sasrec", "generative", "dense"} <= systems.keys()
  report = to_markdown(*compare(systems, reference="sasrec"), reference="sasrec")
  head, *_ = report.splitlines()
  shown = (request.config.rootpath / "docs" / "results" / f"{data}.md").read_text(encoding="utf-8")
  assert head in shown
  rows = [line.split("|")[1:-5] for line in report.splitlines() if line.startswith("| ")]
  assert len(rows) == 1 + len(systems)
  for row in rows:
    assert f"|{'|'.join(row)}|" in shown, row
  assert set(PARTS) <= read_json(folder / "sasrec" / "0" / "results.json").keys()


def test_the_documented_means_are_those_of_the_records(request):
  folder = request.config.rootpath / "experiments" / "records" / "quality"
  shown = (request.config.rootpath / "docs" / "results" / "presets.md").read_text(encoding="utf-8")
  names = {"amazon18_scientific": "Scientific", "amazon14_beauty": "Beauty", "amazon14_sports": "Sports"}
  names["ml100k_posters"] = "MovieLens with posters"
  cells = {}
  for path in sorted(folder.glob("*.json")):
    record = read_json(path)
    cells.setdefault((names[record["data"]], record["system"]), []).append(record)
  assert {system for _, system in cells} >= {"sasrec", "sasrec_features", "dense", "hybrid"}

  def mean(values, form):
    return form.format(np.mean(values)) + (
      f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 and "4f" in form else ""
    )

  for (data, system), records in cells.items():
    parts = [
      " / ".join(mean([record[part][metric] for record in records], "{:.4f}") for metric in ("recall@10", "ndcg@10"))
      for part in ("validation", "test")
    ]
    minutes = [sum(record["seconds"][part] for part in ("recommender", "evaluation")) / 60 for record in records]
    spent = mean(minutes, "{:.1f}"), mean([record["seconds"]["evaluation"] / 60 for record in records], "{:.1f}")
    assert f"| {data} | `{system}` | {len(records)} | {' | '.join(parts)} | {', '.join(spent)} |" in shown
