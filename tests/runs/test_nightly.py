"""Tomorrow's run begins with yesterday's: known items keep their IDs and vectors, whatever their numbers are now."""

import json
import pathlib
import types
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.config import default_config, read_config
from bbqrec_jax.data.directory import load_directory
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.errors import InputError
from bbqrec_jax.recommender.settings import RecommenderSettings
from bbqrec_jax.runs import nightly
from bbqrec_jax.runs.run import run
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.serving.run import load_run
from bbqrec_jax.training.checkpointing import read_params

ITEMS, NEW = 20, 4


class State(NamedTuple):
  """As far as shapes of parameters are looked at."""

  params: Any


def write_data(folder, items, users, *, shift=0.0):
  """Histories in which item n follows item n - 1, over the given items in their order, with features of their own."""
  folder.mkdir()
  vectors = np.random.default_rng(0).normal(size=(ITEMS + NEW, 6)).astype(np.float32) + shift
  np.save(folder / "text_features.npy", vectors[items])
  (folder / "items.jsonl").write_text("\n".join(json.dumps({"id": f"sku-{item}"}) for item in items))
  row = {item: place for place, item in enumerate(items)}
  lines = []
  for user in users:
    history = [(user * 5 + step) % (ITEMS + NEW) for step in range(7)]
    lines.append(f"U{user} {' '.join(str(row[item]) for item in history if item in row)}")
  (folder / "sequences.txt").write_text("\n".join(lines))
  return folder


def make_config(data, **given):
  config = default_config()
  config.update_from_flattened_dict({
    "data.path": str(data), "data.drop_short_users": True, "partitioner": "single",
    "tokenizer.quantizer": "rq_kmeans", "tokenizer.num_levels": 2, "tokenizer.num_codes": 8,
    "recommender.head": "dense", "recommender.similarity": (), "recommender.item_inputs": ("fused", "item"),
    "recommender.width": 8, "recommender.mlp_width": 8, "recommender.num_layers": 1, "recommender.num_heads": 1,
    "recommender.steps": 6, "recommender.evaluate_every": 3, "recommender.max_length": 8, "evaluation.batch_size": 16,
    **given,
  })  # fmt: skip
  return config


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp("nightly")
  yesterday = write_data(root / "yesterday", list(range(ITEMS)), range(30))
  order = np.random.default_rng(1).permutation(ITEMS + NEW)
  today = write_data(root / "today", [item for item in order.tolist() if item != 7], range(5, 40))
  run(make_config(yesterday), root / "before")
  run(make_config(today, init_from=str(root / "before")), root / "after")
  return root


def test_known_items_keep_their_ids_and_new_ones_get_some(folders):
  before, after = (SemanticIds.load(folders / name / "tokenizer") for name in ("before", "after"))
  rows = before.item_ids.rows(after.item_ids.to_json())
  known = rows >= 0
  assert (int(known.sum()), int((~known).sum())) == (ITEMS - 1, NEW)
  assert_array_equal(after.codes[known], before.codes[rows[known]])
  assert_array_equal(after.stream_codes[:, known], before.stream_codes[:, rows[known]])
  assert len(np.unique(after.codes, axis=0)) == len(after.codes)
  assert after.item_ids.to_json() == load_directory(folders / "today").item_ids.to_json()


def test_the_run_is_as_whole_as_any(folders, capsys):
  results = run(make_config(folders / "today", init_from=str(folders / "before")), folders / "after")
  said = capsys.readouterr().out
  assert results["steps"] == 6
  assert "this run is done" in said
  finished = load_run(folders / "after")
  best = finished.recommend([["sku-20", "sku-21"]], k=3)[0]
  assert {one.item for one in best} <= set(load_directory(folders / "today").item_ids.to_json())
  dataset = load_directory(folders / "today", drop_short_users=True)
  words = nightly.describe(nightly.read_earlier(folders / "before", dataset), dataset)
  assert f"{ITEMS - 1} items are known, {NEW} new, 1 gone" in words
  assert "25 users are known" in words


def test_a_run_begins_half_way_between_fresh_parameters_and_the_earlier_ones(folders):
  finished = load_run(folders / "after")
  model, catalogue, config = finished._restored.model, finished._restored.catalogue, finished.config
  earlier = nightly.read_earlier(folders / "before", finished.dataset)
  fresh = read_params(folders / "after" / "checkpoints" / "recommender", finished.results["best_step"])
  made = nightly.grow_params(config, model, catalogue, fresh, earlier)
  step = load_run(folders / "before").results["best_step"]
  before = read_params(folders / "before" / "checkpoints" / "recommender", step)
  known, of_items = earlier.rows >= 0, fresh["item_embedding"]
  half = 0.5 * (before["item_embedding"][earlier.rows[known]] + of_items[known])
  assert_allclose(made["item_embedding"][known], half, rtol=1e-5)
  mean = before["item_embedding"].mean(axis=0)
  assert_allclose(made["item_embedding"][~known], 0.5 * mean + of_items[~known], rtol=1e-5)
  assert_allclose(made["code_embedding"], 0.5 * (before["code_embedding"] + fresh["code_embedding"]), rtol=1e-5)


def test_the_tables_of_candidate_similarity_are_the_earlier_ones(monkeypatch):
  params = {"candidate_similarity": {"scale": np.full(1, 0.4, np.float32)}, "x": np.full(2, 3.0, np.float32)}
  fresh = jax.tree.map(np.ones_like, params)
  monkeypatch.setattr(nightly, "load_results", lambda folder: {"best_step": 1})
  monkeypatch.setattr(nightly, "read_params", lambda folder, step: params)
  monkeypatch.setattr(nightly, "make_recommender", lambda settings: None)
  monkeypatch.setattr(nightly, "initial_state", lambda *args, **options: State(fresh))
  model = types.SimpleNamespace(settings=RecommenderSettings(num_items=2))
  earlier = nightly.Earlier(pathlib.Path("x"), ItemIds.numbered(2), frozenset(), np.arange(2))
  made = nightly.grow_params(None, model, None, fresh, earlier)
  assert_array_equal(made["candidate_similarity"]["scale"], params["candidate_similarity"]["scale"])
  assert_array_equal(made["x"], 2.0)


def test_what_cannot_be_begun_from_is_refused(folders, tmp_path):
  today = folders / "today"
  with pytest.raises(InputError, match="finished run"):
    run(make_config(today, init_from=str(tmp_path)), tmp_path / "run")
  other = write_data(tmp_path / "other", list(range(ITEMS)), range(30), shift=9.0)
  with pytest.raises(InputError, match="--like=YESTERDAY"):
    run(make_config(other, init_from=str(folders / "before")), tmp_path / "run")
  (other / "items.jsonl").write_text("{}\n" * ITEMS)
  with pytest.raises(InputError, match="none of the 20 items"):
    run(make_config(other, init_from=str(folders / "before")), tmp_path / "run")
  with pytest.raises(InputError, match=r"of the same kind.*where \[16\] is needed"):
    run(make_config(today, init_from=str(folders / "before"), **{"recommender.width": 16}), tmp_path / "wide")
  for field, value in (("shard_rows", 64), ("tokenizer.artefact", "x")):
    config = make_config(today, init_from="x", partitioner="mesh", **{field: value})
    with pytest.raises(InputError, match=r"init_from (works|brings)"):
      read_config(config)
