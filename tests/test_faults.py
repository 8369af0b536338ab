"""The short form of the fault harness: a real run is killed, damaged and held up, and ends with the same numbers."""

import os
import pathlib
import subprocess
import sys

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
