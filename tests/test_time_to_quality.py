"""Time to quality: curves, thresholds and clocks, what ends a system, and whether the table is that of the records."""

import itertools
import json
import sys
import time
import types

import numpy as np
import pytest

from bbqrec_jax.errors import InputError
from bbqrec_jax.recommender import train
from bbqrec_jax.training.logging import MetricsLog


@pytest.fixture(scope="module")
def script(load_file):
  return load_file("experiments/peers/time_to_quality.py")


def curve(*points):
  return [
    {"seconds": 60 * minutes, "core_seconds": 30 * minutes, "peak_mib": 1000 + minutes, "step": step,
     "ndcg@10": ndcg, "recall@10": 2 * ndcg, "users": 9}
    for step, (minutes, ndcg) in enumerate(points)
  ]  # fmt: skip


@pytest.fixture(scope="module")
def results():
  common = {"data": "shop", "end": "stopped by itself", "about": {}, "load": [0, 0]}
  return [
    common | {"system": "recbole_sasrec", "curve": curve((10, 0.05), (20, 0.095), (30, 0.1), (40, 0.08))},
    common | {"system": "cornac_sasrec", "curve": [], "end": "failed: ImportError: no"},
    common | {"system": "sasrec", "curve": curve((1, 0.02), (2, 0.091), (3, 0.1), (4, 0.07), (5, 0.11))},
    common | {"system": "dense", "data": "other", "curve": curve((7, 0.3))},
  ]


def test_a_quality_is_reached_by_the_first_validation_that_has_it(script, results):
  points = results[2]["curve"]
  assert script.first_reaching(points, 0.091)["step"] == 1, "as much is enough"
  assert script.first_reaching(points, 0.0911)["step"] == 2
  assert script.first_reaching(points, 0.1001)["step"] == 4, "it may have been left behind in between"
  assert script.first_reaching(points, 0.12) is None
  assert script.first_reaching([], 0.0) is None
  assert script.best(points)["step"] == 4
  assert script.best(curve((1, 0.2), (2, 0.2)))["step"] == 0
  assert script.best([]) is None


def test_the_table_has_times_dashes_and_ends(script, results):
  _, _, recbole, cornac, ours, other = script.to_markdown(results).splitlines()
  cells = [[cell.strip() for cell in line.split("|")[4:-1]] for line in (recbole, cornac, ours, other)]
  assert cells[0] == ["20.0 / 10.0", "30.0 / 15.0", "30.0 / 15.0", "0.2000 / 0.1000", "40.0 / 20.0", "1,040",
                      "stopped by itself"]  # fmt: skip
  assert cells[1] == ["–", "–", "–", "–", "–", "–", "failed: ImportError: no"]
  assert cells[2][:4] == ["2.0 / 1.0", "3.0 / 1.5", "5.0 / 2.5", "0.2200 / 0.1100"]
  assert cells[3][:3] == ["–", "–", "7.0 / 3.5"], "where the reference was not measured, nothing is reached"


def test_the_work_of_others_is_told_as_a_share_of_the_references(script, results):
  (line,) = script.shares(results)
  assert line == (
    "shop: RecBole's best NDCG@10, 0.1000 (stopped by itself), took it 15.0 core-minutes; others needed, of these:"
    " `sasrec` 1/10.0"
  )
  assert script.shares([results[0], results[1]])[0].endswith("none got there")
  assert script.shares(results[1:]) == []


def test_the_picture_is_a_png_with_a_panel_for_each_data_set(script, results, tmp_path):
  import matplotlib.image

  script.draw(results[:3], tmp_path / "one.png")
  script.draw(results, tmp_path / "two.png", clock="core_seconds")
  one, two = (matplotlib.image.imread(tmp_path / name) for name in ("one.png", "two.png"))
  assert two.shape[1] == 2 * one.shape[1]
  assert (one[..., :3].std(axis=2) > 0.1).sum() > 200, "coloured lines"


def test_the_clocks_stand_still_while_they_are_stopped(load_file, tmp_path):
  def burn():
    end = time.process_time() + 0.6
    while time.process_time() < end:
      pass

  clock = load_file("experiments/peers/quality_clock.py")
  written = clock.Curve(tmp_path / "curve.jsonl")
  written.about(versions={})
  written.row(1, ndcg=0.1, recall=0.2, users=3)
  with written.stopped():
    burn()
  written.row(2, ndcg=0.1, recall=0.2, users=3)
  burn()
  written.row(3, ndcg=0.123456, recall=0.2, users=3, sampled=0.5)
  _, *rows = map(json.loads, (tmp_path / "curve.jsonl").read_text().splitlines())
  stopped, running = (
    {name: late[name] - early[name] for name in ("seconds", "core_seconds")} for early, late in itertools.pairwise(rows)
  )
  assert max(stopped.values()) < 0.5
  assert min(running.values()) > 0.55
  assert rows[2]["ndcg@10"] == 0.12346
  assert rows[2]["sampled"] == 0.5
  assert rows[0]["seconds"] > 0
  assert rows[0]["peak_mib"] >= rows[0]["resident_mib"] > 10


def test_a_line_that_was_cut_off_is_no_row(script, tmp_path):
  path = tmp_path / "curve.jsonl"
  path.write_text('{"about": {"settings": 1}}\n{"step": 1}\n{"step": 2}\n{"ste')
  assert script.read_curve(path) == ({"settings": 1}, [{"step": 1}, {"step": 2}])
  assert script.read_curve(tmp_path / "none") == ({}, [])


@pytest.fixture
def stand_in(tmp_path):
  """A function: shell commands -> an interpreter that does these; $4 is where it is to write its curve."""

  def make(commands):
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{commands}\n")
    path.chmod(0o755)
    return str(path)

  return make


def test_how_a_system_ends_is_told(script, stand_in, tmp_path):
  def end(commands, minutes):
    given = {"peer_python": stand_in(commands), "limit_minutes": minutes, "changes": []}
    return script.measure("recbole_sasrec", tmp_path, **given)

  row = """echo '{"step": 1, "ndcg@10": 0.1}' >> "$4";"""
  one = end(row, 0)
  assert (one["end"], one["curve"], one["data"]) == ("stopped by itself", [{"step": 1, "ndcg@10": 0.1}], tmp_path.name)
  one = end(f"{row} exec sleep 100", 0.01)
  assert (one["end"], len(one["curve"])) == ("at the limit of 0.01 minutes", 1)
  one = end("echo one; echo ImportError: no module >&2; exit 3", 0)
  assert (one["end"], one["curve"]) == ("failed: ImportError: no module", [])


def test_what_is_wrong_with_our_side_is_a_row_too(script, tmp_path):
  one = script.measure("sasrec", tmp_path, peer_python="", limit_minutes=0, changes=[])
  assert one["end"].startswith("failed: ")
  assert "sequences.txt" in one["end"]


def test_a_peer_that_splits_otherwise_is_refused(script, load_file, tmp_path):
  peers = load_file("experiments/peers/quality_peers.py")
  assert set(peers.PEERS) == {name for name, (_, of_peer, _) in script.SYSTEMS.items() if of_peer}
  (tmp_path / "sequences.txt").write_text("0 1 2 3 4 0\n1 3 0 2\n")
  assert peers.read_histories(tmp_path) == [[1, 2, 3, 4, 0], [3, 0, 2]]
  whole = types.SimpleNamespace(item_num=6, id2token=lambda field, numbers: [str(number - 1) for number in numbers])

  def part(*rows):
    columns = {name: types.SimpleNamespace(numpy=lambda values=values: np.array(values) + 1)
               for name, values in zip(("user", "item"), zip(*rows, strict=True), strict=True)}  # fmt: skip
    return types.SimpleNamespace(uid_field="user", iid_field="item", inter_feat=columns)

  train, valid = part((0, 3), (0, 2)), part((1, 0), (0, 4))
  peers.check_split(tmp_path, whole, train, valid)
  for message, given in {
    "validation": (whole, train, part((1, 0), (0, 0))),
    "training": (whole, part((0, 2), (0, 3), (0, 4)), valid),
    "ranks 6 items, the data has 5": (types.SimpleNamespace(**vars(whole) | {"item_num": 7}), train, valid),
  }.items():
    with pytest.raises(ValueError, match=message):
      peers.check_split(tmp_path, *given)


def test_wrong_input_is_refused_before_anything_is_measured(script, tmp_path):
  (tmp_path / "sequences.txt").write_text("0 1 2 3\n")
  good = {"only": ["sasrec"], "limit_minutes": 0.0, "peer_python": "", "data": [str(tmp_path)], "change": ["a.b=1"],
          "output": tmp_path / "out.json"}  # fmt: skip

  def check(**given):
    script.check(types.SimpleNamespace(**good | given))

  check()
  check(only=["recbole_sasrec"], peer_python=sys.executable)
  for message, given in {
    "--only: expected some of .*, got bert$": {"only": ["bert", "dense"]},
    "--limit_minutes: .* got -1$": {"limit_minutes": -1.0},
    "--peer_python: recbole_sasrec need": {"only": ["recbole_sasrec"]},
    "--peer_python: no interpreter at /nowhere": {"only": ["cornac_tiger"], "peer_python": "/nowhere"},
    "--data: nothing has no sequences.txt": {"data": ["nothing"]},
    "--change: expected FIELD=JSON, got steps": {"change": ["steps"]},
    "--output: no folder": {"output": tmp_path / "no" / "out.json"},
  }.items():
    with pytest.raises(InputError, match=message):
      check(**given)


def test_results_are_read_as_they_were_written(script, results, tmp_path):
  path = tmp_path / "out.json"
  assert script.read_results(path) == []
  script.write_results(path, results)
  assert script.read_results(path) == results
  path.write_text("[]")
  with pytest.raises(InputError, match="--output"):
    script.read_results(path)


def test_our_curve_is_of_all_users_whoever_the_run_picks_by(load_file, tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  lines = [f"{user} {' '.join(map(str, rng.permutation(30)[:6]))}" for user in range(60)]
  (tmp_path / "data").mkdir()
  (tmp_path / "data" / "sequences.txt").write_text("\n".join(lines) + "\n")
  (tmp_path / "data" / "items.jsonl").write_text("{}\n" * 30)
  for owner, name in ((train, "evaluate"), (MetricsLog, "write")):
    monkeypatch.setattr(owner, name, getattr(owner, name))  # Set back in the end.
  monkeypatch.setattr("bbqrec_jax.command_line.ready_to_train", lambda: None)
  ours, driver = (load_file(f"experiments/peers/{name}.py") for name in ("quality_ours", "time_to_quality"))
  changes = {
    "recommender.steps": 6, "recommender.evaluate_every": 2, "recommender.width": 8, "recommender.mlp_width": 8,
    "recommender.num_heads": 1, "recommender.num_layers": 1, "evaluation.validation_users": 20,
  }  # fmt: skip
  given = [f"{name}={json.dumps(value)}" for name, value in changes.items()]
  found = ours.main("sasrec", str(tmp_path / "data"), str(tmp_path / "curve.jsonl"), *given)
  about, rows = driver.read_curve(tmp_path / "curve.jsonl")
  assert about["settings"] == {"preset": "sasrec"} | changes
  assert "jax" in about["versions"]
  assert [(row["step"], row["users"]) for row in rows] == [(2, 60), (4, 60), (6, 60)]
  assert rows[0]["seconds"] <= rows[1]["seconds"] <= rows[2]["seconds"]
  (picked,) = [row for row in rows if row["step"] == found["best_step"]]
  np.testing.assert_allclose(picked["ndcg@10"], found["validation"]["ndcg@10"], atol=1e-5)
  np.testing.assert_allclose(picked["recall@10"], found["validation"]["recall@10"], atol=1e-5)
  assert picked["sampled ndcg@10"] == max(row["sampled ndcg@10"] for row in rows)
  assert any(row["sampled ndcg@10"] != row["ndcg@10"] for row in rows)


def test_the_documented_table_is_that_of_the_records(script, request):
  root = request.config.rootpath
  kept = script.read_results(root / "experiments" / "records" / "time_to_quality" / "one_core.json")
  assert {one["system"] for one in kept} >= {"recbole_sasrec", "cornac_sasrec", "sasrec", "sasrec_features", "dense"}
  assert {one["data"] for one in kept} == {"amazon18_scientific", "amazon14_beauty"}
  page = (root / "docs" / "benchmarks.md").read_text(encoding="utf-8").splitlines()
  for line in [*script.to_markdown(kept).splitlines(), *(f"- {line}" for line in script.shares(kept))]:
    assert line in page
