"""Whole runs on a small synthetic data set: what they write, how they go on, and recommending from them."""

import contextlib
import dataclasses
import functools
import json
import os
import pickle
import shutil
import signal
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from bbqrec_jax.commands import recommend as recommend_module
from bbqrec_jax.config import default_config
from bbqrec_jax.data import ranking
from bbqrec_jax.data.directory import read_sequences
from bbqrec_jax.data.interactions import choose, from_lengths, leave_one_out
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.data.sources import load
from bbqrec_jax.errors import InputError
from bbqrec_jax.recommender.evaluate import popularity_metrics
from bbqrec_jax.runs import run as experiment
from bbqrec_jax.runs.restore import restore
from bbqrec_jax.runs.workdir import PARTS, load_config
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.serving.recommend import parse_history, parse_times, recommend, recommend_all, write_recommendations
from bbqrec_jax.tokenizer.new_items import assign
from bbqrec_jax.training.logging import MetricsLog
from bbqrec_jax.utils.json_files import read_json, write_json
from bbqrec_jax.utils.settings import flatten
from bbqrec_jax.utils.signals import Interrupted

NUM_ITEMS, LEVELS, CODES = 80, 3, 16
METRICS = {
  *(f"recall@{k}" for k in (1, 5, 10, 20)), *(f"ndcg@{k}" for k in (5, 10, 20)), "mrr", "coverage@10",
}  # fmt: skip


def make_config(**changes):
  config = default_config()
  config.data.source = "synthetic"
  config.update_from_flattened_dict({
    "log_every": 10,
    "data.synthetic.num_users": 200, "data.synthetic.num_items": NUM_ITEMS,
    "tokenizer.num_codes": CODES, "tokenizer.num_levels": LEVELS, "tokenizer.code_width": 16, "tokenizer.hidden": (32,),
    "tokenizer.steps": 60, "tokenizer.warmup_steps": 20, "tokenizer.evaluate_every": 40, "tokenizer.batch_items": 32,
    "tokenizer.batch_rows": 4, "tokenizer.max_length": 10, "tokenizer.row_length": 16,
    "tokenizer.kmeans_iterations": 5, "tokenizer.optimizer.warmup_steps": 5,
    "recommender.width": 32, "recommender.mlp_width": 32, "recommender.num_layers": 1, "recommender.depth_layers": 1,
    "recommender.dropout": 0.1, "recommender.max_length": 10, "recommender.row_length": 16,
    "recommender.batch_rows": 32, "recommender.steps": 120, "recommender.evaluate_every": 40,
    "recommender.optimizer.learning_rate": 5e-3, "recommender.optimizer.warmup_steps": 10,
    "recommender.num_buckets": 8,
    "evaluation.batch_size": 100, "evaluation.beam_width": 20,
  })  # fmt: skip
  config.update_from_flattened_dict(changes)
  return config


GENERATIVE = {"recommender.head": "generative"}
DENSE = {"recommender.head": "dense"}
SASREC = DENSE | {"recommender.item_inputs": ("item",), "recommender.similarity": ()}


pytestmark = pytest.mark.usefixtures("compile_cache")


def finish(factory, name, changes):
  workdir = factory.mktemp(name) / "run"
  return workdir, experiment.run(make_config(**changes), workdir)


@pytest.fixture(scope="module")
def generative(tmp_path_factory, compile_cache):
  return finish(tmp_path_factory, "generative", GENERATIVE)


@pytest.fixture(scope="module")
def dense(tmp_path_factory, compile_cache):
  return finish(tmp_path_factory, "dense", DENSE)


@pytest.fixture(scope="module")
def sasrec(tmp_path_factory, compile_cache):
  return finish(tmp_path_factory, "sasrec", SASREC)


@pytest.fixture(params=["generative", "dense"])
def semantic(request):
  """Each of the two runs that have semantic IDs."""
  return request.getfixturevalue(request.param)


@pytest.fixture(params=["generative", "dense", "sasrec"])
def finished(request):
  """Each of the runs."""
  return request.getfixturevalue(request.param)


@functools.cache
def restored(workdir):
  """A finished run that no test changes, read once."""
  return restore(workdir)


def without_seconds(results):
  return {name: value for name, value in results.items() if name != "seconds"}


def files_of(folder):
  return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_results_hold_what_is_documented(finished):
  workdir, results = finished
  assert read_json(workdir / "results.json") == results
  interactions = load(make_config().data).interactions
  data = results["data"]
  assert data["users"] == 200
  assert data["items"] == NUM_ITEMS
  assert data["interactions"] == interactions.num_interactions
  assert data["source"] == "synthetic"
  split = leave_one_out(interactions)
  assert data["split_hash"] == split.split_hash
  popularity = popularity_metrics(split, split.test_target, num_items=NUM_ITEMS)
  assert results["popularity"] == popularity
  assert results["popularity_without_history"] == popularity_metrics(
    split, split.test_target, num_items=NUM_ITEMS, histories=split.history("test")
  )
  assert popularity != popularity_metrics(split, split.validation_target, num_items=NUM_ITEMS)
  for part in PARTS:
    assert results[part].keys() == METRICS
    assert all(0.0 <= value <= 1.0 for value in results[part].values())
    recalls = [results[part][f"recall@{k}"] for k in (1, 5, 10, 20)]
    assert recalls == sorted(recalls)
    assert results[part]["recall@1"] <= results[part]["mrr"]
  assert results["seconds"].keys() == {"tokenizer", "recommender", "evaluation", "checkpoints"}
  assert results["seconds"]["recommender"] > 0.0
  assert results["seconds"]["evaluation"] > 0.0
  assert results["seconds"]["checkpoints"] > 0.0
  assert results["best_step"] in (40, 80, 120)
  assert results["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(restored(workdir).params))


def test_a_trained_model_beats_popularity(finished):
  _, results = finished
  for name in ("recall@10", "ndcg@10"):
    assert results["test"][name] > results["popularity"][name]
    assert results["validation"][name] > results["popularity"][name]


def test_metrics_are_json_lines(finished):
  workdir, results = finished
  records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
  steps = {
    (stage, kind): [record["step"] for record in records if (record["stage"], record["kind"]) == (stage, kind)]
    for stage in ("tokenizer", "recommender")
    for kind in ("train", "validation")
  }
  assert sum(len(each) for each in steps.values()) == len(records)
  assert steps["recommender", "train"] == list(range(10, 121, 10))
  assert steps["recommender", "validation"] == [40, 80, 120]
  trained = "tokenizer" in os.listdir(workdir)
  assert steps["tokenizer", "train"] == (list(range(10, 61, 10)) if trained else [])
  assert steps["tokenizer", "validation"] == ([40, 60] if trained else [])
  losses = [record["loss"] for record in records if (record["stage"], record["kind"]) == ("recommender", "train")]
  assert losses[-1] < losses[0]
  # The best validation is the one that results.json was taken from.
  validation = {r["step"]: r["ndcg@10"] for r in records if (r["stage"], r["kind"]) == ("recommender", "validation")}
  assert validation[results["best_step"]] == max(validation.values()) == results["validation"]["ndcg@10"]


def test_the_tokenizer_reports_its_health(semantic):
  workdir, results = semantic
  health = read_json(workdir / "tokenizer" / "health.json")
  assert results["seconds"]["tokenizer"] == health["seconds"] > 0.0
  for name in ("usage", "perplexity", "dead"):
    assert len(health[name]) == LEVELS
  for usage, perplexity, dead in zip(health["usage"], health["perplexity"], health["dead"], strict=True):
    assert usage * CODES == pytest.approx(CODES - dead)
    assert 1.0 <= perplexity <= CODES - dead + 1e-9
  ids = SemanticIds.load(workdir / "tokenizer")
  fused = ids.stream_codes[ids.streams.index("fused")]
  assert health["collision_rate_before"] == pytest.approx(1 - len(np.unique(fused, axis=0)) / NUM_ITEMS)
  assert health["collision_rate_after"] == 0.0
  assert ids.codes.shape == (NUM_ITEMS, LEVELS)
  assert len(np.unique(ids.codes, axis=0)) == NUM_ITEMS
  assert 0 <= ids.codes.min() <= ids.codes.max() < CODES


def test_both_heads_share_one_tokenizer(generative, dense):
  # The head is no part of stage 1: the same seed gives the same semantic IDs.
  assert (
    SemanticIds.load(generative[0] / "tokenizer").fingerprint == SemanticIds.load(dense[0] / "tokenizer").fingerprint
  )


def test_sasrec_trains_no_tokenizer(sasrec):
  workdir, results = sasrec
  assert not (workdir / "tokenizer").exists()
  assert os.listdir(workdir / "checkpoints") == ["recommender"]
  assert results["seconds"]["tokenizer"] == 0.0


def test_a_finished_run_is_not_run_again(generative, monkeypatch):
  workdir, results = generative

  def refuse(*args, **kwargs):
    raise AssertionError("a finished run must not train")

  monkeypatch.setattr(experiment, "run_tokenizer", refuse)
  monkeypatch.setattr(experiment, "run_recommender", refuse)
  before = files_of(workdir)
  assert experiment.run(make_config(**GENERATIVE), workdir) == results
  assert files_of(workdir) == before


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"recommender.steps": 121}, "recommender.steps (there 120, now 121)"),
    ({"recommender.head": "dense"}, "recommender.head (there 'generative', now 'dense')"),
    ({"tokenizer.hidden": (64,)}, "tokenizer.hidden (there [32], now [64])"),
    ({"data.synthetic.seed": 1}, "data.synthetic.seed (there 0, now 1)"),
  ],
)
def test_another_config_in_the_same_workdir_is_refused(generative, changes, named):
  workdir, _ = generative
  before = {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
  with pytest.raises(InputError) as error:
    experiment.run(make_config(**(GENERATIVE | changes)), workdir)
  message = str(error.value)
  assert message.startswith(f"{workdir} holds another run, which differs in ")
  assert named in message
  assert "\n" not in message
  assert {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()} == before


def test_what_no_number_depends_on_may_change_between_two_starts(sasrec):
  workdir, results = sasrec
  changes = {"keep_checkpoints": 5, "on_nonfinite": "skip", "max_skipped": 3, "spike_factor": 9.0}
  assert experiment.run(make_config(**SASREC, **changes), workdir) == results
  assert flatten(load_config(workdir)).items() >= changes.items(), "config.json says how it was started last"
  assert experiment.run(make_config(**SASREC), workdir) == results


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"data.source": "directory", "data.path": "nowhere"}, "nowhere"),
    ({"recommender.epochs": 0}, "recommender.epochs"),
    ({"data.modalities": ("sound",)}, "sound"),
  ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, changes, named):
  with pytest.raises(InputError, match=named):
    experiment.run(make_config(**changes), tmp_path / "run")
  assert not (tmp_path / "run").exists()


@contextlib.contextmanager
def signal_when_logged(stage, kind, step):
  """Sends SIGTERM to this process when a record is written: amid training, or amid an evaluation's turn."""
  write = MetricsLog.write

  def write_and_signal(self, *record):
    write(self, *record)
    if record[:3] == (stage, kind, step):
      os.kill(os.getpid(), signal.SIGTERM)

  MetricsLog.write = write_and_signal
  try:
    yield
  finally:
    MetricsLog.write = write


def test_a_run_that_is_cut_again_and_again_ends_with_the_same_results(generative, tmp_path, monkeypatch):
  workdir, expected = generative
  config, cut = make_config(**GENERATIVE), tmp_path / "run"
  cuts = [
    ("tokenizer", "train", 30),  # The codebooks are fitted.
    ("recommender", "train", 30),  # Before the first validation.
    ("recommender", "validation", 80),  # With one.
  ]
  for stage, kind, step in cuts:
    if stage == "recommender" and step == 30:
      # Between the stages nothing is caught: the process is simply gone, here with an exception.
      with monkeypatch.context() as patch:
        patch.setattr(experiment, "run_recommender", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
          experiment.run(config, cut)
      assert SemanticIds.exists(cut / "tokenizer")
    with signal_when_logged(stage, kind, step), pytest.raises(Interrupted):
      experiment.run(config, cut)
    assert not (cut / "results.json").exists()
  assert without_seconds(experiment.run(config, cut)) == without_seconds(expected)
  assert SemanticIds.load(cut / "tokenizer").fingerprint == SemanticIds.load(workdir / "tokenizer").fingerprint


def write_histories(folder, source):
  """The synthetic histories, and nothing else, as a user has them."""
  interactions = load(make_config().data).interactions
  lists = {user: interactions.history(row) for row, user in enumerate(interactions.users)}
  if source == "directory":
    (folder / "sequences.txt").write_text("".join(f"{user} {' '.join(map(str, own))}\n" for user, own in lists.items()))
    (folder / "items.jsonl").write_text("{}\n" * NUM_ITEMS)
  else:
    rows = [f"{user}\t{item}\n" for user, own in lists.items() for item in own]
    (folder / "tiny.inter").write_text("user_id:token\titem_id:token\n" + "".join(rows))
  return {"data.source": source, "data.path": str(folder)}


@pytest.mark.parametrize("source", ["directory", "recbole"])
def test_logs_without_features_do_for_a_recommender_that_reads_none(tmp_path, capsys, source):
  data = write_histories(tmp_path, source)
  short = {"recommender.steps": 10, "recommender.evaluate_every": 10}
  experiment.run(make_config(**SASREC, **data, **short), tmp_path / "run")
  assert "no features" in capsys.readouterr().out
  restored = restore(tmp_path / "run")
  items, _ = recommend(restored.model, restored.params, restored.catalogue, np.array([3, 5]), top=4, beam_width=4)
  assert len(set(items.tolist()) - {3, 5}) == 4
  for changes in (DENSE, SASREC | {"recommender.item_inputs": ("features", "item")}):
    with pytest.raises(
      InputError, match=r"reads items' features, found none: bbqrec features makes them.*NAME_features.npy.*sasrec"
    ):
      experiment.run(make_config(**changes, **data), tmp_path / "other")
  with pytest.raises(InputError, match="reads items' features, found none"):
    experiment.tokenize(make_config(**SASREC, **data), tmp_path / "other")
  assert not (tmp_path / "other").exists()


def test_the_seed_decides_every_number(sasrec, tmp_path):
  workdir, results = sasrec

  def numbers(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]

  again = experiment.run(make_config(**SASREC), tmp_path / "again")
  assert without_seconds(again) == without_seconds(results)
  assert numbers(tmp_path / "again") == numbers(workdir)
  experiment.run(make_config(**SASREC, seed=1), tmp_path / "other")
  losses = [
    [line["loss"] for line in numbers(folder) if line["kind"] == "train"] for folder in (workdir, tmp_path / "other")
  ]
  assert not set(losses[0]) & set(losses[1])


def test_one_device_gives_a_run_of_its_own(sasrec, tmp_path):
  # Dropout is drawn per device, so the figures differ a little; what is written does not.
  config = make_config(**SASREC, partitioner="single")
  config.recommender.steps, config.recommender.evaluate_every = 40, 20
  results = experiment.run(config, tmp_path / "run")
  workdir, of_four = sasrec
  assert results.keys() == of_four.keys()
  assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in workdir.iterdir()}
  assert all(results[part].keys() == METRICS for part in PARTS)

  def logged(workdir, kind, name):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line[name] for line in lines if line["kind"] == kind}

  losses, theirs = (logged(folder, "train", "loss") for folder in (tmp_path / "run", workdir))
  assert losses[10] != theirs[10]
  assert losses[10] == pytest.approx(theirs[10], rel=0.05)
  assert losses[40] < losses[10]
  validation = logged(tmp_path / "run", "validation", "ndcg@10")
  assert validation[results["best_step"]] == max(validation.values()) == results["validation"]["ndcg@10"]
  assert results["test"]["ndcg@10"] > results["popularity"]["ndcg@10"]
  assert len(recommend_from(tmp_path / "run", [5, 9])[0]) == 10


def recommend_from(workdir, history, **options):
  _, _, model, params, catalogue, config, _ = restored(workdir)
  arguments = {"top": 10, "beam_width": config.evaluation.beam_width} | options
  return recommend(model, params, catalogue, np.array(history, np.int32), **arguments)


def dense_scores(model, params, catalogue, batch):
  """What the model says of every item after each history, [B, N] float64."""

  def scores(params):
    states = model.apply({"params": params}, catalogue, batch, method="last_states")
    return model.apply({"params": params}, catalogue, states, model.seen(batch), method="scores")

  return np.asarray(jax.jit(scores)(params), np.float64)


HISTORIES = ([3], [5, 9, 5, 70, 2], list(range(20, 45)))


def test_load_config_gives_back_the_config(finished):
  workdir, _ = finished
  config = load_config(workdir)
  # Where the data lies is no part of what a run is.
  assert flatten(config) == read_flat(workdir)
  assert config.is_locked


def read_flat(workdir):
  head = read_json(workdir / "config.json")["recommender"]["head"]
  sasrec = not (workdir / "tokenizer").exists()
  return flatten(make_config(**(SASREC if sasrec else DENSE if head == "dense" else GENERATIVE)))


def test_recommendations_exist_are_new_and_come_best_first(finished):
  workdir, _ = finished
  _, _, model, params, catalogue, config, _ = restored(workdir)
  for history in HISTORIES:
    array = np.array(history, np.int32)
    items, scores = recommend(model, params, catalogue, array, top=10, beam_width=config.evaluation.beam_width)
    assert len(items) == len(scores) == 10
    assert len(set(items.tolist())) == 10
    assert 0 <= items.min() <= items.max() < NUM_ITEMS
    assert not set(items.tolist()) & set(history)
    assert np.all(np.diff(scores) <= 0)
    assert np.all(np.isfinite(scores))
    assert np.all(scores <= 0)


def test_a_long_history_does_not_shorten_the_list(finished):
  # 60 items may not come back, which the narrow beam would otherwise be full of; 20 are left.
  items, scores = recommend_from(finished[0], range(60), top=15, beam_width=15)
  assert len(items) == len(scores) == 15
  assert items.min() >= 60
  assert np.all(np.diff(scores) <= 0)
  every, _ = recommend_from(finished[0], range(60), top=NUM_ITEMS, beam_width=15)
  assert sorted(every.tolist()) == list(range(60, NUM_ITEMS))


def test_a_file_of_histories_is_answered_as_each_history_by_itself(finished, tmp_path):
  _, _, model, params, catalogue, *_ = restored(finished[0])
  lines = tmp_path / "histories.txt"
  lines.write_text("anna 5 9 70 2\nbo 7\n\u00e7a 1 1 2 3 4 5 6 7 8 9 10 11 12\n", encoding="utf-8")
  histories = read_sequences(lines, num_items=NUM_ITEMS)
  found = recommend_all(model, params, catalogue, histories, top=10, beam_width=20, batch_size=2)
  assert write_recommendations(found, tmp_path / "found.jsonl", ItemIds.numbered(NUM_ITEMS)) == 3
  assert {path.name for path in tmp_path.iterdir()} == {"histories.txt", "found.jsonl"}
  records = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
  assert [record["user"] for record in records] == ["anna", "bo", "\u00e7a"]
  for user, record in enumerate(records):
    items, scores = recommend(model, params, catalogue, histories.history(user), top=10, beam_width=20)
    assert record["items"] == items.tolist()
    np.testing.assert_allclose(record["scores"], scores, atol=1e-4)


def test_very_active_users_are_answered_as_any_other(finished, monkeypatch):
  _, _, model, params, catalogue, *_ = restored(finished[0])
  # Whoever has had few items, many, all of them, and one over and over.
  histories = [[5], range(40), [7], range(NUM_ITEMS), [3] * 500, range(60, NUM_ITEMS), [9, 9, 8]]
  lengths = np.array([len(own) for own in histories])
  histories = from_lengths(np.concatenate(histories), lengths, np.arange(len(lengths)).astype(str))

  def answers():
    return list(recommend_all(model, params, catalogue, histories, top=12, beam_width=20, batch_size=4))

  together = answers()
  monkeypatch.setattr(ranking, "_ORDINARY", 4)
  apart = answers()
  assert [user for user, _, _ in apart] == [str(user) for user in range(7)]
  for (_, items, scores), (_, same_items, same_scores) in zip(together, apart, strict=True):
    assert items.tolist() == same_items.tolist()
    np.testing.assert_allclose(scores, same_scores, atol=1e-5)
  assert [len(items) for _, items, _ in apart] == [12, 12, 12, 0, 12, 12, 12]


def test_an_empty_history_is_refused(sasrec):
  with pytest.raises(InputError, match="history of 'history': expected at least one item, got none"):
    recommend_from(sasrec[0], [], top=3)


def test_it_is_said_that_nothing_is_left_and_that_times_cannot_be_told(sasrec, monkeypatch, capsys):
  names = ("user", "titles", "allow", "deny", "histories", "output", "timestamps", "data", "tokenizer", "features")
  options = dict.fromkeys(names)
  options |= {"workdir": sasrec[0], "top": 5, "repeat": False, "trust": [], "times": "0" + ",3e9" * (NUM_ITEMS - 1)}
  options = SimpleNamespace(**options, history=",".join(map(str, range(NUM_ITEMS))))
  monkeypatch.setattr(recommend_module, "quiet_flags", lambda: options)
  recommend_module.main([])
  first, *_, last = capsys.readouterr().out.splitlines()
  assert first.startswith("warning: by their times 1 of 1 histories last longer than 68 years")
  assert last.startswith("nothing is left to recommend")
  options.repeat, options.times = True, None
  recommend_module.main([])
  first, *_, last = capsys.readouterr().out.splitlines()
  assert first == "history:"
  assert last.split()[0] == "5"


def test_new_items_are_served_without_training(generative, tmp_path):
  workdir, _ = generative
  known = restored(workdir)
  # Twins of all known items, item NUM_ITEMS + n of item n, so that it is plain whom they go to.
  extended = assign(known.ids, known.dataset.features, known.dataset.present)
  extended.save(tmp_path / "ids")
  more = restore(workdir, tokenizer=tmp_path / "ids")
  every = 2 * NUM_ITEMS
  assert len(more.dataset.titles) == more.catalogue.num_items == every
  np.testing.assert_array_equal(more.ids.codes, extended.codes)
  np.testing.assert_array_equal(more.catalogue.edges, known.catalogue.edges)
  histories = leave_one_out(known.dataset.interactions).history("test")
  histories = choose(histories, slice(histories.offsets[40]), histories.lengths[:40], histories.users[:40])
  # One in four of the items that are looked back on is new.
  items = histories.items + np.where(np.arange(len(histories.items)) % 4 == 0, NUM_ITEMS, 0).astype(np.int32)
  histories = dataclasses.replace(histories, items=items)
  found = recommend_all(
    more.model, more.params, more.catalogue, histories, top=every, beam_width=every, batch_size=40
  )  # fmt: skip
  places = []
  for user, (_, items, scores) in enumerate(found):
    assert sorted(items.tolist()) == sorted(set(range(every)) - set(histories.history(user).tolist()))
    assert np.isfinite(scores).all()
    best = next(item for item in items if item < NUM_ITEMS and item + NUM_ITEMS in items)
    places.append(items.tolist().index(best + NUM_ITEMS))
  assert np.mean(places) < 20, "of some 150 items the twin of the best known one must be among the first"

  for name, change in (
    ("codes", (extended.codes + 1) % CODES),
    ("stream_codes", (extended.stream_codes + 1) % CODES),
    ("present", ~extended.present),
    ("codebooks", extended.codebooks + 1),
  ):
    dataclasses.replace(extended, **{name: change}).save(tmp_path / name)
    with pytest.raises(InputError, match="does not extend the semantic IDs that the recommender was trained on"):
      restore(workdir, tokenizer=tmp_path / name)


def test_new_items_need_ids_and_the_features_that_are_read(sasrec, generative, tmp_path):
  with pytest.raises(InputError, match="knows items by number alone"):
    restore(sasrec[0], tokenizer=generative[0] / "tokenizer")


@pytest.mark.parametrize("times", ["1,2", "1,2,x", "1,3,2", "1,2,inf", ""])
def test_bad_times_are_refused(times):
  with pytest.raises(InputError, match="--times: expected 3 numbers in time order"):
    parse_times(times, count=3)


def test_parse_times():
  assert parse_times(None, count=3) is None
  assert parse_times("1, 2.5,9", count=3).tolist() == [1, 2.5, 9]


def test_dense_recommendations_against_brute_force(dense):
  workdir, _ = dense
  _, _, model, params, catalogue, *_ = restored(workdir)
  assert catalogue.trie is None
  history = [5, 9, 70, 2]
  rows = {"items": [history], "segments": [[1] * 4], "positions": [[0, 1, 2, 3]]}
  batch = {name: np.array(grid, np.int32) for name, grid in rows.items()}
  logits = dense_scores(model, params, catalogue, batch)[0]
  expected = logits - np.log(np.sum(np.exp(logits)))
  items, scores = recommend_from(workdir, history, top=NUM_ITEMS, repeat=True)
  np.testing.assert_array_equal(np.sort(items), np.arange(NUM_ITEMS))
  np.testing.assert_allclose(scores, np.sort(expected)[::-1], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(scores, expected[items], rtol=1e-4, atol=1e-4)
  new, new_scores = recommend_from(workdir, history, top=NUM_ITEMS)
  keep = ~np.isin(items, history)
  np.testing.assert_array_equal(new, items[keep])
  np.testing.assert_array_equal(new_scores, scores[keep])


def test_generative_recommendations_against_every_items_log_probability(generative):
  workdir, _ = generative
  _, _, model, params, catalogue, *_ = restored(workdir)
  history = [5, 9, 70, 2]
  rows = {"items": [history], "segments": [[1] * 4], "positions": [[0, 1, 2, 3]]}
  batch = {name: np.array(grid, np.int32) for name, grid in rows.items()}

  def log_probs(params):
    state = model.apply({"params": params}, catalogue, batch, method="last_states")
    every = np.arange(NUM_ITEMS)[None]
    return model.apply({"params": params}, catalogue, state, every, model.seen(batch), method="log_probs")

  expected = np.asarray(jax.jit(log_probs)(params))[0]
  # A beam as wide as the catalogue is an exact search.
  items, scores = recommend(model, params, catalogue, np.array(history, np.int32), top=NUM_ITEMS, beam_width=NUM_ITEMS)
  assert sorted(items.tolist()) == sorted(set(range(NUM_ITEMS)) - set(history))
  np.testing.assert_allclose(scores, expected[items], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(scores, np.sort(np.delete(expected, history))[::-1], rtol=1e-4, atol=1e-4)


WATCHED = []  # What the hook below writes into while there is a list in it; a hook cannot be taken off again.


def _watch(event, arguments):
  if WATCHED and event.split(".")[0] in ("pickle", "import", "exec", "marshal", "subprocess", "os", "open", "shutil"):
    WATCHED[0].append((event, arguments))


@contextlib.contextmanager
def watching():
  """The audit events of the interpreter, (name, arguments) each, of what is done inside."""
  if not hasattr(_watch, "added"):
    sys.addaudithook(_watch)
    _watch.added = True
  events = []
  WATCHED.append(events)
  try:
    yield events
  finally:
    WATCHED.clear()


def test_reading_a_run_unpickles_imports_runs_and_writes_nothing(generative):
  workdir, _ = generative
  restore(workdir)  # Whatever a library imports the first time it is used.
  with watching() as events:
    restore(workdir)
  opened = {os.fspath(arguments[0]) for event, arguments in events if event == "open"}
  assert str(workdir / "tokenizer" / "codes.npy") in opened
  writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
  assert not [arguments for event, arguments in events if event == "open" and (arguments[2] or 0) & writing]
  assert {event for event, _ in events} <= {"open", "os.scandir", "os.listdir", "os.walk"}
  with watching() as events:
    pickle.loads(pickle.dumps(len))
  assert ("pickle.find_class", ("builtins", "len")) in events


def test_the_best_model_is_what_recommends(dense):
  # The restored parameters rank the test items as results.json says: judged here user by user, without `evaluate`.
  workdir, results = dense
  dataset, _, model, params, catalogue, *_ = restored(workdir)
  split = leave_one_out(dataset.interactions)
  histories, length = split.history("test"), model.settings.max_length
  batch = {name: np.zeros((200, length), np.int32) for name in ("items", "segments", "positions")}
  for user in range(200):
    last = histories.history(user)[-length:]
    for name, values in (("items", last), ("segments", 1), ("positions", np.arange(len(last)))):
      batch[name][user, : len(last)] = values
  scores = dense_scores(model, params, catalogue, batch)
  own = scores[np.arange(200), split.test_target]
  ranks = np.sum(scores >= own[:, None], axis=1) - 1
  hits = ranks < 10
  # Rounding may swap near neighbours at the cut, for one user of the 200 at the very most.
  assert results["test"]["recall@10"] == pytest.approx(hits.mean(), abs=1 / 200 + 1e-6)
  written = np.load(workdir / "ranks.npz")
  assert np.mean(written["test"] == ranks) >= 0.95
  assert np.mean(written["validation"] < 10) == pytest.approx(results["validation"]["recall@10"], abs=1e-6)

  # The same with every user's own items out of the ranking.
  for user in range(200):
    scores[user, histories.history(user)] = -np.inf
  left = np.sum(scores >= own[:, None], axis=1) - 1
  assert np.any(left < ranks)
  assert np.mean(written["test_without_history"] == left) >= 0.95
  for part in ("validation", "test"):
    hits = np.mean(written[f"{part}_without_history"] < 10)
    assert hits == pytest.approx(results[f"{part}_without_history"]["recall@10"], abs=1e-6)


def test_figures_without_the_history_are_those_of_what_is_recommended(finished):
  # A search that leaves the history out, as `recommend` does, user by user.
  workdir, results = finished
  dataset, _, model, params, catalogue, *_ = restored(workdir)
  split = leave_one_out(dataset.interactions)
  width = load_config(workdir).evaluation.beam_width
  found = recommend_all(model, params, catalogue, split.history("test"), top=10, beam_width=width)
  hits = [target in items for target, (_, items, _) in zip(split.test_target, found, strict=True)]
  assert results["test_without_history"]["recall@10"] == pytest.approx(np.mean(hits), abs=1 / 200 + 1e-6)
  assert results["test_without_history"]["recall@10"] > results["test"]["recall@10"]


def test_parse_history():
  np.testing.assert_array_equal(parse_history("3, 17,0", ItemIds.numbered(18)), [3, 17, 0])
  assert parse_history("3", ItemIds.numbered(4)).dtype == np.int32
  named = ItemIds(["sku-1", "a,b", 'say "x"'])
  np.testing.assert_array_equal(parse_history('"a,b", sku-1,"say ""x"""', named), [1, 0, 2])


@pytest.mark.parametrize(
  ("text", "entry", "shown"),
  [
    ("3,80", 2, "'80'"),
    ("-1", 1, "'-1'"),
    ("", 1, "''"),
    ("1,,2", 2, "''"),
    ("1,2,x", 3, "'x'"),
    ("1.5", 1, "'1.5'"),
    ("1e1", 1, "'1e1'"),
  ],
)
def test_bad_history_entries_are_refused(text, entry, shown):
  with pytest.raises(InputError) as error:
    parse_history(text, ItemIds.numbered(NUM_ITEMS))
  assert str(error.value).startswith(f"--history entry {entry}: expected the id of an item, got {shown}; ")
  assert "from 0 to 79" in str(error.value)


def test_a_workdir_without_a_run_is_refused(tmp_path):
  with pytest.raises(InputError, match=r"config\.json does not exist: --workdir must be that of a run"):
    restore(tmp_path)
  with pytest.raises(InputError, match=r"config\.json does not exist"):
    load_config(tmp_path / "nowhere")


@pytest.fixture
def copied(sasrec, tmp_path):
  """A copy of a finished run, to be damaged."""
  shutil.copytree(sasrec[0], tmp_path / "run")
  return tmp_path / "run"


def test_an_unfinished_run_is_refused(copied):
  (copied / "results.json").unlink()
  with pytest.raises(InputError, match=r"holds no finished run \(no results\.json\)"):
    restore(copied)


def test_a_trained_recommender_that_does_not_say_which_ids_it_reads_is_refused(dense, tmp_path):
  shutil.copytree(dense[0], tmp_path / "run")
  (tmp_path / "run" / "recommender.json").unlink()
  with pytest.raises(InputError, match=r"recommender\.json: expected a JSON file, found nothing"):
    restore(tmp_path / "run")
  assert not (tmp_path / "run" / "recommender.json").exists()


def test_a_checkpoint_that_does_not_fit_the_config_is_refused_before_it_is_read(copied):
  config, note = read_json(copied / "config.json"), read_json(copied / "run.json")
  config["recommender"]["mlp_width"] = note["recommender.mlp_width"] = 10**12
  write_json(copied / "config.json", config)
  write_json(copied / "run.json", note)
  with pytest.raises(InputError, match=r"checkpoints/recommender/\d+: expected a checkpoint that fits the config"):
    restore(copied)


@pytest.mark.parametrize("damaged", ["cut off", "changed"])
@pytest.mark.parametrize("name", ["run.json", "results.json"])
def test_damaged_notes_are_refused_and_named(copied, name, damaged):
  whole = (copied / name).read_text()
  (copied / name).write_text(whole[:-9] if damaged == "cut off" else whole.replace("0", "1", 1))
  with pytest.raises(InputError, match=rf"run/{name}: expected "):
    experiment.run(make_config(**SASREC), copied)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Of reads that orbax abandons.
def test_a_damaged_model_is_refused_and_made_again_where_that_is_asked_for(copied, sasrec):
  _, results = sasrec
  best = copied / "checkpoints" / "recommender" / str(results["best_step"])
  damaged = max(best.rglob("*"), key=lambda path: path.stat().st_size)
  content = bytearray(damaged.read_bytes())
  content[len(content) // 2] ^= 1
  damaged.write_bytes(content)
  with pytest.raises(InputError, match=rf"{damaged} was changed or cut off .*remove the workdir's results.json"):
    restore(copied)
  (copied / "results.json").unlink()
  assert without_seconds(experiment.run(make_config(**SASREC), copied)) == without_seconds(results)
  restore(copied)


def test_a_run_of_another_version_is_refused(copied):
  config = read_json(copied / "config.json")
  config["recommender"]["forgotten"] = 1
  write_json(copied / "config.json", config)
  with pytest.raises(InputError, match=r"does not fit this version .*field recommender\.forgotten is unknown"):
    restore(copied)


def test_a_run_on_other_data_is_refused(copied):
  config, note = read_json(copied / "config.json"), read_json(copied / "run.json")
  config["data"]["synthetic"]["seed"] = note["data.synthetic.seed"] = 5
  write_json(copied / "config.json", config)
  write_json(copied / "run.json", note)
  with pytest.raises(InputError, match="was trained on"):
    restore(copied)
