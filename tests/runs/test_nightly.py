"""Tomorrow's run begins with yesterday's: known items keep their IDs and vectors, whatever their numbers are now."""

import json
import shutil

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.config import default_config, read_config
from bbqrec_jax.data.directory import load_directory
from bbqrec_jax.data.interactions import from_lengths
from bbqrec_jax.errors import InputError
from bbqrec_jax.recommender import train
from bbqrec_jax.runs import nightly
from bbqrec_jax.runs.run import run
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.serving.run import load_run
from bbqrec_jax.training.checkpointing import read_params
from bbqrec_jax.utils.json_files import read_json, write_json

ITEMS, NEW = 20, 4


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
  dataset = load_directory(folders / "today")
  words = nightly.describe(nightly.read_earlier(folders / "before", dataset), dataset)
  assert f"{ITEMS - 1} items are known, {NEW} new, 1 gone" in words
  assert "25 users are known" in words


class Begun(Exception):
  """Ends a run where its training would begin."""


def first_parameters(config, workdir, monkeypatch):
  """The parameters that a run begins with, and the fresh ones."""
  kept = {}

  def look(params, state, partitioner):
    kept.update(params=params, fresh=partitioner.fetch(state.params))
    raise Begun

  monkeypatch.setattr(train, "_starting_from", look)
  with pytest.raises(Begun):
    run(config, workdir)
  return kept["params"], kept["fresh"]


def best_parameters(workdir):
  return read_params(workdir / "checkpoints" / "recommender", load_run(workdir).results["best_step"])


def test_users_of_whom_more_was_learned_than_is_now_are_counted(folders):
  dataset = load_directory(folders / "today")
  earlier = nightly.read_earlier(folders / "before", dataset)
  histories = from_lengths(np.zeros(9, np.int64), np.array([2, 3, 4]), np.array(["U7", "U8", "new"]))
  for counts, expected in (({"U7": 2, "U8": 3}, 0), ({"U7": 3, "U8": 3}, 1), ({"U7": 3, "U8": None, "gone": 9}, 1)):
    assert nightly.learned_before(earlier._replace(learned_from=counts), histories) == expected


def test_a_run_begins_half_way_between_fresh_parameters_and_the_earlier_ones(folders, tmp_path, monkeypatch):
  config = make_config(folders / "today", init_from=str(folders / "before"))
  made, fresh = first_parameters(config, tmp_path / "run", monkeypatch)
  before = best_parameters(folders / "before")
  earlier = nightly.read_earlier(folders / "before", load_directory(folders / "today"))
  known, of_items = earlier.rows >= 0, fresh["item_embedding"]
  half = 0.5 * (before["item_embedding"][earlier.rows[known]] + of_items[known])
  assert_allclose(made["item_embedding"][known], half, rtol=1e-5)
  mean = before["item_embedding"].mean(axis=0)
  assert_allclose(made["item_embedding"][~known], 0.5 * mean + of_items[~known], rtol=1e-5)
  assert_allclose(made["code_embedding"], 0.5 * (before["code_embedding"] + fresh["code_embedding"]), rtol=1e-5)


STREAMS = {"recommender.candidate_similarity.streams": ("fused", "behaviour")}


@pytest.fixture(scope="module")
def compared(folders):
  """A run of yesterday with tables of candidate similarity."""
  run(make_config(folders / "yesterday", **STREAMS), folders / "compared")
  return folders / "compared"


@pytest.mark.parametrize("enough", [True, False])
def test_tables_are_fitted_anew_where_enough_users_have_something_new(folders, compared, tmp_path, monkeypatch, enough):
  calls, fit = [], train.fit_similarity

  def spy(params, model, shared, catalogue, histories, targets, *, users, **options):
    calls.append((jax.device_get(params), histories, targets, users))
    return fit(params, model, shared, catalogue, histories, targets, users=users, **options)

  monkeypatch.setattr(train, "fit_similarity", spy)
  monkeypatch.setattr(train, "_FEWEST_USERS", 2 if enough else 10**6)
  # User 9 has nothing new: what is its last training transition today was learned from yesterday.
  noted = read_json(compared / "ids.json")
  today = load_directory(folders / "today").interactions
  counts = dict(zip(today.users.tolist(), (today.lengths - 2).tolist(), strict=True))
  yesterday = {user: counts[user] - (user != "U9") if user in counts else 0 for user in noted["users"]}
  changed = copied(compared, tmp_path / "compared", learned_from=list(yesterday.values()))
  config = make_config(folders / "today", init_from=str(changed), **STREAMS)
  made, _ = first_parameters(config, tmp_path / "run", monkeypatch)
  before = best_parameters(compared)
  if not enough:
    assert not calls
    jax.tree.map(assert_array_equal, made["candidate_similarity"], before["candidate_similarity"])
    return
  ((base, histories, targets, users),) = calls
  assert_array_equal(base["code_embedding"], before["code_embedding"])
  assert "U9" not in today.users[users]
  assert set(today.users[users]) == set(today.users) - {"U9"}
  for user in users.tolist():
    whole = today.history(user)
    assert_array_equal([*histories.history(user), targets[user]], whole[:-2])
  fitted = read_json(tmp_path / "run" / "candidate_similarity.json")["parameters"]
  assert_allclose(made["candidate_similarity"]["tables"], fitted["tables"], rtol=1e-6)
  assert not np.allclose(made["candidate_similarity"]["tables"], before["candidate_similarity"]["tables"])


def test_the_final_training_begins_near_the_held_out_base(folders, compared, tmp_path, monkeypatch):
  shutil.copytree(compared, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "recommender")
  (tmp_path / "run" / "results.json").unlink()
  fitted, bases = train._fitted_tables, []

  def spy(*arguments):
    tables, base, progress = fitted(*arguments)
    bases.append(jax.tree.map(lambda leaf: leaf + 1, base))  # Six steps lead nowhere by themselves.
    return tables, bases[0], progress

  monkeypatch.setattr(train, "_fitted_tables", spy)
  made, fresh = first_parameters(make_config(folders / "yesterday", **STREAMS), tmp_path / "run", monkeypatch)
  (base,) = bases
  for name in ("item_embedding", "code_embedding"):
    assert_allclose(made[name], 0.2 * base[name] + 0.8 * fresh[name], rtol=1e-5)
  tables = read_json(tmp_path / "run" / "candidate_similarity.json")["parameters"]
  assert_allclose(made["candidate_similarity"]["tables"], tables["tables"], rtol=1e-6)


def copied(workdir, to, **changes):
  """A copy of a finished run whose `ids.json` says something else."""
  shutil.copytree(workdir, to)
  noted = read_json(to / "ids.json")
  noted.pop("checksum", None)
  write_json(to / "ids.json", noted | changes)
  return to


def test_a_run_that_does_not_say_what_it_learned_from_keeps_its_tables(folders, compared, tmp_path):
  old = copied(compared, tmp_path / "old", learned_from=[])
  dataset = load_directory(folders / "today")
  start = nightly.warm_start(None, nightly.read_earlier(old, dataset), dataset.interactions)
  new = ~np.isin(dataset.interactions.users, read_json(old / "ids.json")["users"])
  assert 0 < new.sum() < len(new)
  assert_array_equal(start.unseen, new)
  for counts in (["x"] * 30, [1, 2], 5):
    damaged = copied(compared, tmp_path / f"damaged {len(str(counts))}", learned_from=counts)
    with pytest.raises(InputError, match="restore it"):
      nightly.read_earlier(damaged, dataset)


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
