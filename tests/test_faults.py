"""The short form of the fault harness: a real run is killed, damaged and held up, and ends with the same numbers."""

import os
import pathlib
import shutil
import subprocess
import sys
import types

import pytest

from bbqrec_jax.utils.json_files import read_json

ROOT = pathlib.Path(__file__).parents[1]


def test_a_run_survives_kills_a_damaged_checkpoint_and_files_that_may_not_grow(tmp_path):
  command = [sys.executable, "experiments/faults.py", "--short", f"--output={tmp_path / 'faults.json'}"]
  result = subprocess.run(
    command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stdout + result.stderr
  *rows, total = read_json(tmp_path / "faults.json")["rows"]
  assert total == {"fault": "all", "injected": 8, "survived": 7, "refused": 1, "wrong": 0}
  assert {row["fault"] for row in rows} == {
    "SIGTERM during step", "SIGKILL during save", "SIGINT during evaluation",
    "checkpoint of the recommender: flipped bit", "file size limit (ulimit -f)", "environment: JAX_ENABLE_X64=1",
    "goes on in a folder of an odd name", "a second start of a run that is underway",
  }  # fmt: skip


LINE = "error: process 1 of this run gave no sign of life for 40 s"
ENDS = f"sleep 0.3; echo {LINE} >&2; kill -ABRT $$"


class FakeBench:
  """Shell scripts in place of a run's processes, of which several are numbered by how often they were started."""

  def __init__(self, faults, folder, *starts):
    self.folder, self.count, self.rows, self.wrong, self._faults = folder, 3, {}, [], faults
    self._starts, self.peace, self.made, self.verdicts = list(starts), None, 0, []

  def fresh(self, like=None):
    self.made += 1
    workdir = self.folder / f"run{self.made}"
    (workdir / "checkpoints" / "recommender").mkdir(parents=True)
    (workdir / "results.json").touch()
    return types.SimpleNamespace(workdir=workdir)

  def start(self, run, hosts):
    environment = os.environ | {"WORKDIR": str(run.workdir)}
    return [
      self._faults.Process(["bash", "-c", script], environment, self.folder / str(index))
      for index, script in enumerate(self._starts.pop(0))
    ]

  def judge(self, fault, run, *, log):
    self.verdicts.append(f"run{self.made}")
    return self.note(fault, "survived", "")

  def row(self, fault):
    return self._faults.Bench.row(self, fault)

  def note(self, fault, verdict, what):
    return self._faults.Bench.note(self, fault, verdict, what)


DONE = "sleep 0.3; touch $WORKDIR/results.json"
KILLED = [ENDS, ENDS, "exec sleep 60"]


@pytest.fixture
def faults(load_file, monkeypatch):
  """The harness, to whose faults every moment is right; it waits for seconds, not for minutes."""
  module = load_file("experiments/faults.py")
  parts = dict.fromkeys(("step", "save", "evaluation"), lambda: None)
  monkeypatch.setattr(module, "moments", lambda *args, **options: parts)
  monkeypatch.setattr(module, "SLOWED", 0.1)
  monkeypatch.setattr(module, "ENDED_WITHIN", 3)
  return module


@pytest.mark.parametrize(
  ("how", "scripts", "clear"),
  [
    ("killed", KILLED, True),
    ("killed", [ENDS, f"echo Traceback >&2; {ENDS}", "exec sleep 60"], False),
    ("killed", [ENDS, "sleep 0.3; kill -ABRT $$", "exec sleep 60"], False),
    ("killed", [ENDS, f"sleep 0.3; echo {LINE} >&2", "exec sleep 60"], False),  # Status 0.
    ("killed", [ENDS, f"sleep 4; echo {LINE} >&2; exit 1", "exec sleep 60"], False),  # Too late.
    ("stopped", [ENDS, ENDS, f"sleep 0.1; {ENDS.replace('process 1', 'processes 0, 1')}"], True),
    ("stopped", [ENDS, ENDS, "sleep 0.1; echo nothing known >&2; exit 1"], False),
    ("slowed", [DONE, DONE, DONE], True),
    ("slowed", [DONE, f"{DONE}; echo late >&2", DONE], False),
    ("slowed", [DONE, "exit 1", DONE], False),
  ],
)
def test_what_becomes_of_the_others_is_judged(how, scripts, clear, faults, tmp_path):
  bench = FakeBench(faults, tmp_path, scripts)
  run = bench.fresh()
  (run.workdir / "results.json").unlink()
  problem, figures = faults.one_of_several(bench, run, how, "step", 2)
  assert (problem == "") == clear
  assert figures["seconds_of_the_others"] > 0.05
  if (how, clear) == ("killed", True):
    assert (figures["statuses"], figures["standard_error"]) == ([-6, -6, -9], [[LINE], [LINE], []])
    assert figures["seconds_of_the_others"] < 3


def test_faults_befall_one_run_until_it_ends_and_one_that_comes_too_late_is_tried_again(faults, tmp_path):
  # The first run is over before the fault comes; the second meets two, and its end tells of both.
  bench = FakeBench(faults, tmp_path, [DONE, DONE, DONE], KILLED, [DONE, DONE, DONE])
  faults.several(bench, short=True)
  assert (bench.made, bench.verdicts, bench.wrong) == (2, ["run2"], [])
  rows = list(bench.rows.values())
  assert [row["fault"] for row in rows] == ["process 2 killed during step", "process 0 slowed during save"]
  assert [(row["injected"], row["survived"], row["statuses"]) for row in rows] == [
    (1, 1, [-6, -6, -9]), (1, 1, [0, 0, 0]),
  ]  # fmt: skip
  assert "| seconds of the others |" in faults.table(rows)


def test_a_fault_that_the_others_do_not_bear_well_is_wrong(faults, tmp_path):
  silent = ["sleep 0.3; exit 1", ENDS, "exec sleep 60"]
  bench = FakeBench(faults, tmp_path, silent, [DONE, DONE, DONE])
  faults.several(bench, short=True)
  rows = list(bench.rows.values())
  assert [(row["injected"], row["survived"], row["wrong"]) for row in rows] == [(1, 0, 1), (1, 1, 0)]
  assert len(bench.wrong) == 1


def connect(inside, address):
  """What comes of connecting to a port of another host that nobody listens on."""
  code = f"import socket; socket.create_connection(({address!r}, 9), timeout=2)"
  command = [*inside, sys.executable, "-I", "-c", code]
  return subprocess.run(command, capture_output=True, text=True, check=False).stderr.splitlines()[-1]


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="networks are for root, by ip")
def test_a_host_is_reached_by_its_name_until_it_is_cut_off(load_file, tmp_path):
  faults = load_file("experiments/faults.py")
  try:
    faults.Hosts(tmp_path, 2).close()
  except subprocess.CalledProcessError:
    pytest.skip("no leave to make networks")
  hosts = faults.Hosts(tmp_path, 2)  # Nothing is left of those before.
  try:
    name = subprocess.run([*hosts.inside(0), "hostname"], capture_output=True, text=True, check=True).stdout.strip()
    assert name != os.uname().nodename
    assert connect(hosts.inside(1), name).startswith("ConnectionRefusedError")
    hosts.cut_off(1)
    assert not connect(hosts.inside(1), name).startswith("ConnectionRefusedError")
  finally:
    hosts.close()
  assert name not in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
