"""The list of runs: a damaged one is among the others."""

import json

import pytest

from bbqrec_jax.commands import runs as command
from bbqrec_jax.runs.workdir import PARTS, SHOWN
from bbqrec_jax.utils.json_files import write_json


@pytest.fixture
def runs(tmp_path):
  """Three finished runs of two heads."""
  for name, head in (("a", "dense"), ("b", "hybrid"), ("c", "dense")):
    write_json(tmp_path / name / "config.json", {"recommender": {"head": head}})
    write_json(tmp_path / name / "run.json", {})
    data = {"name": "made", "users": 1, "items": 2, "interactions": 3, "split_hash": "0"}
    parts = {part: dict.fromkeys(SHOWN, 0.5) for part in PARTS}
    about = {"model": head, "data": data, "best_step": 5, "steps": 10, "seconds": {"recommender": 60.0}}
    write_json(tmp_path / name / "results.json", about | parts)
  return tmp_path


@pytest.fixture
def listed(runs, capsys, monkeypatch):
  """A function that gives what the program prints of the runs."""

  def show(*, as_json):
    monkeypatch.setattr(command, "quiet_flags", lambda: type("Options", (), {"sort": "minutes", "json": as_json}))
    command.main(["runs", str(runs)])
    return capsys.readouterr().out

  return show


@pytest.mark.parametrize("name", ["results.json", "config.json"])
def test_a_damaged_run_is_listed_with_its_fault(runs, listed, name):
  (runs / "b" / name).write_text("{\n")
  lines = listed(as_json=False).splitlines()
  assert [line.split(" | ")[1] for line in lines[2:5]] == ["finished", "finished", "damaged"]
  assert lines[5] == ""
  assert lines[6].startswith(f"{runs / 'b'} is damaged: {runs / 'b' / name}: expected a JSON file")
  assert len(lines) == 7
  assert lines[0].endswith("| minutes | head |" if name == "results.json" else "| minutes |")
  rows = json.loads(listed(as_json=True))
  assert [row["state"] for row in rows] == ["finished", "finished", "damaged"]
  assert [("fault" in row) for row in rows] == [False, False, True]
