"""What a shell says of JAX changes no number of a run, or is refused in one line."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from bbqrec_jax.config import default_config
from bbqrec_jax.errors import InputError
from bbqrec_jax.runs import run as experiment
from bbqrec_jax.utils.environment import settle_jax, start_devices
from bbqrec_jax.utils.json_files import read_json

FIELDS = {
  "partitioner": "single", "data.source": "synthetic", "data.synthetic.num_users": 60, "data.synthetic.num_items": 40,
  "tokenizer.quantizer": "rq_kmeans", "tokenizer.num_codes": 8, "tokenizer.num_levels": 2,
  "tokenizer.kmeans_iterations": 2, "recommender.head": "dense", "recommender.width": 8, "recommender.mlp_width": 8,
  "recommender.num_layers": 1, "recommender.max_length": 8, "recommender.row_length": 8, "recommender.batch_rows": 8,
  "recommender.steps": 4, "recommender.evaluate_every": 2, "evaluation.batch_size": 32,
}  # fmt: skip
# Each of them ended a run, or gave it other numbers, or other types to its files.
UNKIND = {
  "JAX_ENABLE_X64": "1",
  "JAX_DEFAULT_PRNG_IMPL": "rbg",
  "JAX_RANDOM_SEED_OFFSET": "3",
  "JAX_THREEFRY_PARTITIONABLE": "0",
  "JAX_HIGH_DYNAMIC_RANGE_GUMBEL": "1",
  "JAX_NUMPY_DTYPE_PROMOTION": "strict",
  "JAX_DEBUG_INFS": "1",
  "JAX_DEBUG_NANS": "1",
  "JAX_DISABLE_JIT": "1",
  "JAX_TRANSFER_GUARD": "disallow",
  "JAX_COMPILATION_CACHE_DIR": __file__,
  "PYTHONOPTIMIZE": "2",
  "PYTHONWARNINGS": "error",
}
IGNORED = ("JAX_DEBUG_INFS", "JAX_DISABLE_JIT", "JAX_TRANSFER_GUARD", "JAX_COMPILATION_CACHE_DIR")


def program(name, *arguments, **environment):
  command = [sys.executable, "-m", "bbqrec_jax", name, *arguments]
  return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.fixture
def settings():
  """JAX's, put back afterwards."""
  before = dict(jax.config.values)
  yield
  for name, value in before.items():
    if jax.config.values[name] != value:
      jax.config.update(name, value)


def test_no_setting_of_the_shell_changes_a_run(tmp_path):
  config = default_config()
  config.update_from_flattened_dict(FIELDS)
  expected = experiment.run(config, tmp_path / "kind")
  file = tmp_path / "config.py"
  file.write_text(
    "from bbqrec_jax.config import default_config\n\n\ndef get_config():\n  config = default_config()\n"
    f"  config.update_from_flattened_dict({FIELDS})\n  return config\n"
  )
  # The compiler is told what it is told here.
  ended = program(
    "train", f"--config={file}", f"--workdir={tmp_path / 'unkind'}", JAX_DISABLE_MOST_OPTIMIZATIONS="1", **UNKIND
  )
  assert ended.returncode == 0, ended.stderr
  warnings = [line for line in ended.stdout.splitlines() if line.startswith("warning: JAX_")]
  assert [line.split("=")[0] for line in warnings] == [f"warning: {name}" for name in IGNORED]
  results = read_json(tmp_path / "unkind" / "results.json")
  for each in (results, expected):
    del each["seconds"]
  assert results == expected
  for name in ("codes", "codebooks"):
    one, other = (np.load(tmp_path / kind / "tokenizer" / f"{name}.npy") for kind in ("kind", "unkind"))
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("variable", ["JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_PLATFORMS"])
def test_a_value_that_jax_does_not_know_is_one_line(variable, tmp_path):
  ended = program("assign", "--tokenizer=t", "--features=f", f"--output={tmp_path / 'made'}", **{variable: "nonsense"})
  assert ended.returncode == 2
  assert ended.stderr.startswith("error: JAX cannot start")
  assert ended.stderr.count("\n") == 1
  assert "nonsense" in ended.stderr
  assert variable.lower() in ended.stderr.lower()
  assert not list(tmp_path.iterdir())


def test_what_a_program_cannot_do_with_is_set_and_what_was_asked_for_is_named(settings, capsys):
  for name, value in {"jax_enable_x64": True, "jax_debug_infs": True, "jax_debug_nans": True}.items():
    jax.config.update(name, value)
  jax.config.update("jax_transfer_guard_host_to_device", "log")
  settle_jax()
  assert not jax.config.jax_enable_x64
  assert not jax.config.jax_debug_infs
  assert jax.config.jax_debug_nans  # What ends a run that has gone wrong anyway.
  assert jax.config.jax_transfer_guard_host_to_device == "allow"
  said = capsys.readouterr().out.splitlines()
  assert [line.split(" is ignored: ")[0] for line in said] == [
    "warning: JAX_DEBUG_INFS=True",
    "warning: JAX_TRANSFER_GUARD_HOST_TO_DEVICE=log",
  ]
  settle_jax()
  assert not capsys.readouterr().out


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU can")
def test_a_precision_that_the_device_has_not_is_refused(settings):
  jax.config.update("jax_default_matmul_precision", "bfloat16")
  start_devices()
  jax.config.update("jax_default_matmul_precision", "TF32_TF32_F32")
  with pytest.raises(InputError, match="JAX_DEFAULT_MATMUL_PRECISION=TF32_TF32_F32"):
    start_devices()
