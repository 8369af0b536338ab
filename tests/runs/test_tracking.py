"""Runs in a list, and what trackers are told of them."""

import json
import pathlib

import pytest

from bbqrec_jax.commands import runs as command
from bbqrec_jax.errors import InputError
from bbqrec_jax.runs.listing import differing, find_workdirs, read_run, sort_runs, to_rows, to_table
from bbqrec_jax.runs.tracking import TRACKERS, read_records, track, write_board
from bbqrec_jax.runs.workdir import PARTS, SHOWN
from bbqrec_jax.utils.json_files import write_json

RECORDS = [
  {"stage": "tokenizer", "kind": "train", "step": 10, "time": 1.0, "loss": 3.0},
  {"stage": "recommender", "kind": "train", "step": 5, "time": 2.0, "loss": 2.0, "note": "words"},
  {"stage": "recommender", "kind": "validation", "step": 5, "time": 2.5, "ndcg@10": 0.25},
]


def make_run(folder, *, head="dense", ndcg=None, records=RECORDS):
  write_json(
    folder / "config.json", {"seed": 0, "recommender": {"head": head, "steps": 20}, "data": {"path": str(folder)}}
  )
  write_json(folder / "run.json", {})
  (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
  if ndcg is not None:
    finish(folder, ndcg)
  return folder


def finish(folder, ndcg):
  data = {"name": "made", "users": 1, "items": 2, "interactions": 3, "split_hash": "0"}
  parts = {part: dict.fromkeys(SHOWN, ndcg) for part in PARTS}
  seconds = {"recommender": 90.0, "evaluation": 30.0}
  write_json(
    folder / "results.json", {"model": "m", "data": data, "best_step": 5, "steps": 20, "seconds": seconds, **parts}
  )


@pytest.fixture
def runs(tmp_path):
  make_run(tmp_path / "a" / "0", head="dense", ndcg=0.1)
  make_run(tmp_path / "a" / "1", head="hybrid", ndcg=0.3)
  make_run(tmp_path / "b", head="generative", records=RECORDS[:2])
  make_run(tmp_path / "c", head="generative", records=[])
  (tmp_path / "a" / "0" / "tokenizer").mkdir()
  return tmp_path


def test_workdirs_are_found_below_a_folder_each_once(runs):
  found = [path.relative_to(runs).as_posix() for path in find_workdirs([runs, runs / "a" / "0"])]
  assert found == ["a/0", "a/1", "b", "c"]
  with pytest.raises(InputError, match="found none; check the path"):
    find_workdirs([runs / "nowhere"])
  with pytest.raises(InputError, match="expected a workdir"):
    find_workdirs([runs / "a" / "0" / "tokenizer"])


def test_the_list_says_how_far_what_and_how_they_differ(runs):
  read = [read_run(path) for path in find_workdirs([runs])]
  assert [run.state for run in read] == ["finished", "finished", "recommender 5/20", "not begun"]
  assert differing(read) == ["recommender.head"]
  ordered = sort_runs(read, "test ndcg@10")
  assert [run.workdir.name for run in ordered] == ["1", "0", "b", "c"]
  lines = to_table(ordered).splitlines()
  assert lines[0].startswith("| run | state | data | validation recall@10 |")
  assert lines[0].endswith("| minutes | head |")
  assert "| 0.3000 | 0.3000 | 0.3000 | 0.3000 | 2.0 | hybrid |" in lines[2]
  (first, *_) = to_rows(ordered)
  assert first["config"] == {"recommender.head": "hybrid"}
  assert first["test ndcg@10"] == 0.3


def test_the_program_prints_a_table_or_json(runs, capsys, monkeypatch):
  monkeypatch.setattr(command, "quiet_flags", lambda: type("Options", (), {"sort": "minutes", "json": True}))
  command.main(["runs", str(runs)])
  assert len(json.loads(capsys.readouterr().out)) == 4
  with pytest.raises(SystemExit):
    command.main(["runs"])
  assert "expected folders with runs" in capsys.readouterr().err


class Heard:
  """A tracker that remembers."""

  def __init__(self):
    self.told, self.begun, self.results = [], [], []

  def begin(self, name, config, *, again):
    self.begun.append((name, config["recommender.head"], again))
    return again or "first"

  def log(self, stage, kind, step, values):
    self.told.append((stage, kind, step, dict(values)))

  def finish(self, results):
    self.results.append(results)


def test_a_tracker_is_told_of_each_record_once(tmp_path):
  heard, folder = Heard(), make_run(tmp_path / "mine", records=RECORDS[:2])
  assert track(folder, heard, name="heard") == 2
  assert heard.told == [
    ("tokenizer", "train", 10, {"loss": 3.0}),
    ("recommender", "train", 5, {"loss": 2.0}),
  ]
  assert heard.results == [{}], "it is not finished"
  with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
    file.write(json.dumps(RECORDS[2]) + '\n{"stage": "recomm')  # The last line is still being written.
  finish(folder, 0.2)
  assert track(folder, heard, name="heard") == 1
  assert heard.told[2:] == [("recommender", "validation", 5, {"ndcg@10": 0.25})]
  assert heard.begun == [("mine", "dense", None), ("mine", "dense", "first")]
  assert heard.results[1]["test/ndcg@10"] == 0.2
  assert heard.results[1]["seconds/recommender"] == 90.0
  assert track(folder, heard, name="heard") == 0


def test_a_run_is_followed_until_it_is_finished(tmp_path):
  heard, folder = Heard(), make_run(tmp_path / "mine", records=RECORDS[:1])
  turns = iter([lambda: None, lambda: make_run(folder, records=RECORDS), lambda: finish(folder, 0.4)])

  def wait():
    next(turns)()
    return True

  assert track(folder, heard, name="heard", wait=wait) == 3
  assert [told[0] for told in heard.told] == ["tokenizer", "recommender", "recommender"]
  assert heard.results[0]["test/ndcg@10"] == 0.4


def test_what_is_no_record_is_left_out(tmp_path):
  path = tmp_path / "metrics.jsonl"
  assert list(read_records(path)) == []
  path.write_text('{"stage": "a", "kind": "b", "step": 1}\nnothing\n[1]\n{"step": 2}\n', encoding="utf-8")
  assert len(list(read_records(path))) == 1


def test_tensorboard_has_the_results_and_the_settings(tmp_path):
  from tensorboardX.proto.event_pb2 import Event

  folder = make_run(tmp_path / "mine", ndcg=0.2)
  write_board(folder, {"recommender.head": "dense", "seed": 0, "tokenizer.hidden": (32,)})
  (path,) = (folder / "tensorboard" / "results").iterdir()
  content, place, values, tags = path.read_bytes(), 0, {}, []
  while place < len(content):  # A record is its length, a checksum, itself, a checksum.
    length = int.from_bytes(content[place : place + 8], "little")
    event = Event.FromString(content[place + 12 : place + 12 + length])
    place += length + 16
    for value in event.summary.value:
      tags.append(value.tag)
      values[value.tag] = value.simple_value
  assert values["test/ndcg_10"] == pytest.approx(0.2)
  assert values["best_step"] == 5
  assert any(tag.startswith("_hparams_") for tag in tags)
  assert b"recommender.head" in content


def test_mlflow_keeps_a_run_offline(tmp_path):
  pytest.importorskip("mlflow")
  folder = make_run(tmp_path / "mine", ndcg=0.2)
  tracker = TRACKERS["mlflow"]("tests", offline=True, folder=folder)
  assert track(folder, tracker, name="mlflow") == 3
  from mlflow.tracking import MlflowClient

  client = MlflowClient((folder / "mlruns").absolute().as_uri())
  (experiment,) = [one for one in client.search_experiments() if one.name == "tests"]
  (run,) = client.search_runs([experiment.experiment_id])
  assert run.data.params["recommender.head"] == "dense"
  assert run.data.metrics["test/ndcg_at_10"] == 0.2
  assert run.data.metrics["recommender/validation/ndcg_at_10"] == 0.25
  assert run.info.status == "FINISHED"


def test_wandb_keeps_a_run_offline(tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
  monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
  folder = make_run(tmp_path / "mine", ndcg=0.2)
  tracker = TRACKERS["wandb"]("tests", offline=True, folder=folder)
  assert track(folder, tracker, name="wandb") == 3
  (written,) = folder.glob("wandb/offline-run-*/run-*.wandb")
  content = pathlib.Path(written).read_bytes()
  assert b"recommender/validation/ndcg@10" in content
  assert b"test/ndcg@10" in content


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
  import sys

  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(InputError, match=r"pip install 'bbqrec_jax\[wandb\]'"):
    TRACKERS["wandb"]("tests", offline=True, folder=tmp_path)
