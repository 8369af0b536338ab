"""Metrics on disk: no line twice, no half lines, and errors that are heard."""

import json

import pytest
from tensorboardX.proto.event_pb2 import Event

from bbqrec_jax.training.logging import MetricsLog


def records(folder):
  lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  return [(r["stage"], r["kind"], r["step"]) for r in map(json.loads, lines)]


@pytest.fixture
def log(tmp_path):
  """A log of two stages, closed."""
  made = MetricsLog(tmp_path)
  made.resume("tokenizer", 0, evaluated_step=0)
  for step in (10, 20):
    made.write("tokenizer", "train", step, {"loss": 1.0 / step})
  made.resume("recommender", 0, evaluated_step=0)
  made.write("recommender", "train", 10, {"loss": 2.0})
  made.write("recommender", "validation", 10, {"ndcg@10": 0.25})
  made.write("recommender", "train", 20, {"loss": 1.0})
  made.close()
  return made


ALL = [
  ("tokenizer", "train", 10), ("tokenizer", "train", 20), ("recommender", "train", 10),
  ("recommender", "validation", 10), ("recommender", "train", 20),
]  # fmt: skip


@pytest.mark.parametrize(
  ("stage", "step", "evaluated_step", "kept"),
  [
    ("recommender", 20, 20, ALL),
    ("recommender", 19, 10, ALL[:4]),
    ("recommender", 10, 0, ALL[:3]),
    ("recommender", 0, 0, ALL[:2]),
    ("tokenizer", 10, 0, [ALL[0], *ALL[2:]]),
  ],
)
def test_a_stage_that_goes_on_drops_what_it_logged_past_that(tmp_path, log, stage, step, evaluated_step, kept):
  again = MetricsLog(tmp_path)
  again.resume(stage, step, evaluated_step=evaluated_step)
  again.close()
  assert records(tmp_path) == kept


def test_a_line_that_was_cut_off_is_dropped_wherever_it_was_cut(tmp_path, log, capsys):
  whole = (tmp_path / "metrics.jsonl").read_bytes()
  last = len(whole.splitlines(keepends=True)[-1])
  for cut in range(1, last + 1):
    (tmp_path / "metrics.jsonl").write_bytes(whole[:-cut])
    again = MetricsLog(tmp_path)
    again.write("recommender", "train", 30, {"loss": 0.5})
    again.close()
    assert records(tmp_path) == [*ALL[:-1], ("recommender", "train", 30)], cut
  assert capsys.readouterr().out.count("dropped 1 of 5 lines that are no whole records") == last - 1


def test_lines_that_are_no_records_are_dropped(tmp_path, log, capsys):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'\xff\xfe{"stage"\n' + path.read_bytes() + b"[]\n3\n")
  again = MetricsLog(tmp_path)
  again.resume("recommender", 20, evaluated_step=20)
  again.close()
  assert records(tmp_path) == ALL
  assert "dropped 1 of 8 lines" in capsys.readouterr().out


def events(path):
  """The events of a TensorBoard file: each between its length with a checksum, and a checksum of itself."""
  content, found = path.read_bytes(), []
  while content:
    size = int.from_bytes(content[:8], "little")
    found.append(Event.FromString(content[12 : 12 + size]))
    content = content[16 + size :]
  return found


def test_tensorboard_has_each_stage_and_is_told_what_no_longer_counts(tmp_path, log):
  again = MetricsLog(tmp_path)
  again.resume("tokenizer", 10, evaluated_step=0)
  again.write("tokenizer", "train", 20, {"loss": 0.5, "items": [1, 2]})
  again.close()
  (path,) = (tmp_path / "tensorboard" / "recommender").iterdir()
  values = [(e.summary.value[0].tag, e.step, e.summary.value[0].simple_value) for e in events(path)[2:]]
  assert values == [
    ("recommender/train/loss", 10, 2.0), ("recommender/validation/ndcg_10", 10, 0.25),
    ("recommender/train/loss", 20, 1.0),
  ]  # fmt: skip
  found = [event for path in (tmp_path / "tensorboard" / "tokenizer").iterdir() for event in events(path)]
  assert [event.step for event in found if event.HasField("session_log")][-1] == 11
  assert [(v.tag, event.step) for event in found for v in event.summary.value][-1] == ("tokenizer/train/loss", 20)


@pytest.mark.skipif("not __import__('os').path.exists('/dev/full')", reason="needs /dev/full")
def test_a_full_disk_is_an_error_at_once(tmp_path, log):
  again = MetricsLog(tmp_path)
  again.resume("recommender", 20, evaluated_step=20)
  again._file.close()
  again._file = open("/dev/full", "w")  # noqa: SIM115
  with pytest.raises(OSError, match="No space left on device"):
    again.write("recommender", "train", 30, {"loss": 1.0})
  with pytest.raises(OSError, match="No space left on device"):
    again.close()
