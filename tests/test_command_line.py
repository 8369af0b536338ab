"""The programs as a shell meets them: bad input is one line on stderr, a status that is not 0, and nothing written."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import types

import pytest
from absl import flags

from bbqrec_jax.command_line import training
from bbqrec_jax.errors import Diverged, InputError, StorageError
from bbqrec_jax.interruption import Interrupted
from bbqrec_jax.recommend import check_options

ROOT = pathlib.Path(__file__).parents[1]


def call(module, *arguments):
  return subprocess.run(
    [sys.executable, "-m", f"bbqrec_jax.{module}", *arguments],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
    timeout=300,
  )


@pytest.mark.parametrize(
  ("config", "arguments", "named"),
  [
    ("directory.py", ["--config.data.path=no/such/folder"], "no/such/folder"),
    ("quickstart.py", ["--config.recommender.head=nosuch"], "recommender.head"),
    ("nosuch.py", [], "configs/nosuch.py"),
    ("scientific.py:sasrec_feature", [], "'sasrec_feature' is neither a field nor a choice"),
    ("beauty.py:hybird", [], "'hybird' is neither a field nor a choice"),
    ("tiger.py:nosuch", [], "'nosuch' is neither a field nor a choice"),
  ],
)
def test_bad_input_is_one_line(tmp_path, config, arguments, named):
  workdir = tmp_path / "run"
  result = call("main", f"--config=configs/{config}", f"--workdir={workdir}", *arguments)
  assert result.returncode not in (0, None)
  lines = result.stderr.splitlines()
  assert len(lines) == 1, result.stderr
  assert lines[0].startswith("error: ")
  assert named in lines[0]
  assert not workdir.exists()


def test_an_unknown_config_field_is_named(tmp_path):
  workdir = tmp_path / "run"
  result = call("main", "--config=configs/quickstart.py", f"--workdir={workdir}", "--config.recommender.nosuch=1")
  assert result.returncode != 0
  assert "Traceback" not in result.stderr, result.stderr
  assert "nosuch" in result.stderr
  assert not workdir.exists()


def test_recommending_from_no_run_is_one_line(tmp_path):
  result = call("recommend", f"--workdir={tmp_path}", "--history=1,2")
  assert result.returncode != 0
  assert result.stderr.splitlines() == [
    f"error: {tmp_path}/config.json does not exist: --workdir must be that of a run of bbqrec_jax.main"
  ]
  assert result.stdout == ""
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("given", "said"),
  [
    ({"history": "1", "top": 0}, "--top must be at least 1, got 0"),
    ({}, "give either --history=3,17,256 or --histories=FILE"),
    ({"history": "1", "histories": "h"}, "give either --history=3,17,256 or --histories=FILE"),
    ({"histories": "h"}, "--output=FILE goes with --histories=FILE"),
    ({"history": "1", "output": "o"}, "--output=FILE goes with --histories=FILE"),
    ({"history": "1", "timestamps": "t"}, "--timestamps: --times goes with --history"),
    ({"histories": "h", "output": "o", "times": "1"}, "--times: --times goes with --history"),
    ({"histories": "h", "output": "no/such/folder/o"}, "no/such/folder is no folder"),
    ({"histories": "h", "output": "."}, ". exists already"),
  ],
)
def test_flags_of_recommend_that_do_not_go_together(given, said):
  nothing = dict.fromkeys(("history", "histories", "times", "timestamps", "output"))
  with pytest.raises(InputError, match=re.escape(said)):
    check_options(types.SimpleNamespace(**({"top": 10} | nothing | given)))


def test_an_export_of_no_run_or_onto_something_is_one_line(tmp_path):
  for arguments, said in (
    ([f"--workdir={tmp_path}", f"--output={tmp_path}"], f"{tmp_path} exists already: choose another --output"),
    ([f"--workdir={tmp_path}", f"--output={tmp_path}/new"], f"{tmp_path}/config.json does not exist"),
    ([f"--workdir={tmp_path}", f"--output={tmp_path}/new", "--platforms=cpu,abacus"], "got ['abacus']"),
  ):
    result = call("export", *arguments)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert said in line
    assert not list(tmp_path.iterdir())


@pytest.fixture
def parsed():
  """absl's own flags, as a program has them."""
  flags.FLAGS(["program"])
  yield
  flags.FLAGS.unparse_flags()


@pytest.mark.parametrize(
  ("error", "status", "said"),
  [
    (InputError("bad\nfield"), 2, "error: bad field\n"),
    (StorageError("no disk"), 1, "error: no disk\n"),
    (Diverged("nan"), 1, "error: nan\n"),
    (
      OSError(28, "No space left on device"),
      1,
      "error: runs/x: could not write what a run leaves there: No space left on device; mend that, and the same command"
      " goes on from the last checkpoint\n",
    ),
    (
      PermissionError(13, "Permission denied", "runs/x/run.json"),
      1,
      "error: runs/x: could not write what a run leaves there: Permission denied (runs/x/run.json); mend that, and the"
      " same command goes on from the last checkpoint\n",
    ),
    (Interrupted(signal.SIGTERM), 0, ""),
    (Interrupted(signal.SIGINT), 130, ""),
    (KeyboardInterrupt(), 130, ""),
  ],
  ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_ends_a_training_is_one_line_and_a_status(parsed, capsys, error, status, said):
  with pytest.raises(SystemExit) as end, training(pathlib.Path("runs/x")):
    raise error
  assert end.value.code == status
  out, err = capsys.readouterr()
  assert err == said
  if isinstance(error, Interrupted):
    assert out == f"stopped by {error}, everything is saved; the same command goes on from here\n"


class Finaliser:
  """Python cannot raise what a signal raises while it is called."""

  def __del__(self):
    os.kill(os.getpid(), signal.SIGINT)


class Faulty:
  def __del__(self):
    raise ValueError("bug")


async def abandoned():
  pass


def test_what_python_tells_of_dropped_objects_is_left_out_where_it_is_dealt_with(parsed, capsys, monkeypatch):
  monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

  def work():
    with training(pathlib.Path("runs/x")):
      Finaliser()
      abandoned()

  with pytest.raises(SystemExit) as end:
    work()
  assert end.value.code == 130
  assert capsys.readouterr() == ("stopped by SIGINT, everything is saved; the same command goes on from here\n", "")
  # Other errors that nobody can catch are still told.
  Faulty()
  assert "ValueError: bug" in capsys.readouterr().err


def test_an_error_of_the_program_itself_keeps_its_traceback(parsed):
  for error in (ValueError("bug"), FileNotFoundError(2, "No such file")):
    with pytest.raises(type(error)), training(pathlib.Path("runs/x")):
      raise error
