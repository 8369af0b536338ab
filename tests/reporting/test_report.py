"""The page of a finished run: whole by itself, whatever the run has, and a browser draws it."""

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest

import bbqrec_jax
from bbqrec_jax.config import default_config
from bbqrec_jax.reporting.report import charts_of, gather, write_report
from bbqrec_jax.runs.restore import restore

pytestmark = pytest.mark.usefixtures("compile_cache")
SMALL = {
  "data.source": "synthetic", "data.synthetic.num_users": 60, "data.synthetic.num_items": 40, "partitioner": "single",
  "log_every": 5, "tokenizer.quantizer": "rq_kmeans", "tokenizer.num_codes": 8, "tokenizer.num_levels": 3,
  "tokenizer.kmeans_iterations": 3, "recommender.width": 8, "recommender.mlp_width": 8, "recommender.num_layers": 1,
  "recommender.max_length": 6, "recommender.row_length": 8, "recommender.batch_rows": 8, "recommender.steps": 10,
  "recommender.evaluate_every": 5, "recommender.num_buckets": 4, "recommender.head": "dense",
  "evaluation.batch_size": 32, "evaluation.beam_width": 10,
}  # fmt: skip
RUNS = {
  "dense": {
    "recommender.item_inputs": ("fused", "features", "item"),
    "recommender.candidate_similarity.streams": ("features", "fused", "behaviour"),
  },
  "sasrec": {"recommender.item_inputs": ("item",), "recommender.similarity": ()},
}


@pytest.fixture(scope="module", params=RUNS)
def made(request, tmp_path_factory):
  """(workdir, what is told of the run, the folder of its report)."""
  config = default_config()
  config.update_from_flattened_dict(SMALL | RUNS[request.param])
  workdir = tmp_path_factory.mktemp(request.param)
  bbqrec_jax.run(config, workdir)
  told = gather(workdir, restore(workdir))
  folder = tmp_path_factory.mktemp("report")
  written = write_report(folder, told, pictures=request.param == "dense")
  return workdir, told, folder, written


def test_the_page_fetches_nothing_and_shows_what_the_run_has(made):
  workdir, told, folder, written = made
  page = (folder / "report.html").read_text(encoding="utf-8")
  markup = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
  assert "http" not in markup
  assert not re.search(r"\bsrc=|<link(?! rel=\"icon\" href=\"data:)", markup)
  results = json.loads((workdir / "results.json").read_text())
  assert f"{results['test']['ndcg@10']:.4f}" in markup
  names = {chart.name for chart in charts_of(told)}
  assert {"recommender_loss", "recommender_validation", "map", "by_length", "by_popularity"} <= names
  has_ids = told["semantic_ids"] is not None
  assert ("code_use" in names) == has_ids == any(name.startswith("similarity_") for name in names)
  panels = {chart.title for chart in told["compared"]}
  assert panels == ({"Features of image", "Features of text", "Fused", "Behaviour"} if has_ids else set())
  assert all(f'id="chart-{name}"' in markup for name in names)
  assert {path.name for path in written} == {path.name for path in folder.iterdir()}
  pictures = [path for path in written if path.suffix == ".png"]
  assert len(pictures) == (len(names) if has_ids else 0)
  assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_the_page_says_how_data_was_split_and_how_many_were_ranked(made, tmp_path):
  workdir, told, folder, _ = made
  ranked = len(np.load(workdir / "ranks.npz")["test"])
  page = (folder / "report.html").read_text(encoding="utf-8")
  assert "leave-one-out: each user&#39;s last item is the test item" in page
  assert f"(hash {told['data']['split_hash']})" in page
  assert f"ranked for each of {ranked} users." in page
  assert "has learned from the very items" not in page
  assert "five groups" not in page
  other = told | {"split": "temporal: ...", "ranked": ranked - 7, "learned": True}
  write_report(tmp_path, other, pictures=False)
  page = (tmp_path / "report.html").read_text(encoding="utf-8")
  assert "leave-one-out" not in page
  assert f"ranked for each of {ranked - 7} users: those of the {ranked} who have a test item." in page
  assert "has learned from the very items" in page


@pytest.mark.parametrize("split", ["temporal", "none"])
def test_a_split_is_told_by_its_name(made, split):
  workdir, _, _, _ = made
  restored = restore(workdir)
  told = gather(workdir, restored._replace(split=dataclasses.replace(restored.split, kind=split)))
  assert told["split"].startswith(f"{split}: ")
  assert told["learned"] == (split == "none")
  assert ("figures are on what was learned from" in told["split"]) == (split == "none")


def test_what_0_7_does_is_told_only_without_a_network(made, tmp_path):
  workdir, told, _, _ = made
  if not told["compared"]:
    pytest.skip("no candidate similarity")
  restored = restore(workdir)
  assert restored.model.settings.candidate_similarity.network_units > 0
  params = {name: np.array(value) for name, value in restored.params["candidate_similarity"].items()}
  for fitted in (False, True):
    params |= {"direct": np.full_like(params["direct"], fitted), "output": np.zeros_like(params["output"])}
    told = gather(workdir, restored._replace(params={**restored.params, "candidate_similarity": params}))
    write_report(tmp_path, told, pictures=False)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ("0.7 more doubles" in page) == (not fitted)
    assert ("A network then weighs" in page) == fitted


def test_users_are_shown_with_what_came_and_what_was_recommended(made):
  _, told, _, _ = made
  best, worst = told["extremes"]["best"], told["extremes"]["worst"]
  assert len(best) == len(worst) == 4
  ranks = [user["rank"] or 10**9 for user in best + worst[::-1]]
  assert ranks == sorted(ranks)
  for user in best:
    assert user["history"]
    assert user["hit"] == (user["rank"] <= 5)
    assert not user["hit"] or user["recommended"][user["rank"] - 1] == user["next"]


def test_a_title_cannot_break_out_of_the_page(made, tmp_path):
  _, told, _, _ = made
  evil = '</script><img src=x onerror="document.title=1">'
  changed = json.loads(json.dumps({"extremes": told["extremes"]}))
  changed["extremes"]["best"][0]["next"] = evil
  changed["map"] = told["map"]._replace(text=evil, title=evil)
  write_report(tmp_path, told | changed, pictures=False)
  page = (tmp_path / "report.html").read_text(encoding="utf-8")
  assert "<img" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
  assert page.count("</script>") == 2


def test_a_browser_draws_every_chart(made, tmp_path):
  chromium = shutil.which("chromium") or shutil.which("google-chrome")
  if not chromium:
    pytest.skip("no chromium")
  _, told, folder, _ = made
  command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom",
             f"--user-data-dir={tmp_path}", pathlib.Path(folder / "report.html").as_uri()]  # fmt: skip
  shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
  assert 'data-drawn="all"' in shown
  drawn = re.findall(r'id="chart-(\w+)"[^>]*>\s*<(?:div|details|svg|canvas)', shown)
  assert set(drawn) == {chart.name for chart in charts_of(told)}
