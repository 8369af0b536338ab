"""Runs the cases of a config, and reads results back."""

import json
import os
import pathlib
import platform
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import bbqrec_jax
from bbqrec_jax.benchmarks.cases import all_cases
from bbqrec_jax.benchmarks.limits import PEAKS, measured_limits
from bbqrec_jax.benchmarks.report import records_table, utilisation
from bbqrec_jax.benchmarks.timing import measure
from bbqrec_jax.config import read_config
from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.environment import start_devices
from bbqrec_jax.utils.json_files import read_json


def device_kind() -> str:
  """JAX's name of the device; JAX calls every CPU "cpu", so of one its model, widest vectors and number of cores."""
  kind = str(jax.devices()[0].device_kind)
  if jax.default_backend() != "cpu":
    return kind
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
  except OSError:
    return f"{platform.processor() or kind}, {os.cpu_count()} cores"
  facts = dict(line.split(":", 1) for line in lines if ":" in line)
  facts = {name.strip(): value.strip() for name, value in facts.items()}
  abilities = facts.get("flags", "").split()
  vectors = [name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in abilities][:1]
  return ", ".join([facts.get("model name", kind), *vectors, f"{os.cpu_count()} cores"])


def about(name: str) -> dict[str, Any]:
  """What says which machine and which versions a result is of."""
  commit = "unknown"
  if shutil.which("git"):
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or commit
  return {
    "config": name, "version": bbqrec_jax.__version__, "commit": commit,
    "jax": jax.__version__, "numpy": np.__version__, "python": platform.python_version(),
    "backend": jax.default_backend(), "device_kind": device_kind(),
    "device_count": jax.device_count(), "process_count": jax.process_count(), "cores": os.cpu_count(),
    "load": os.getloadavg()[0],
  }  # fmt: skip


def run(
  config: Any, *, only: tuple[str, ...] = (), keep: Callable[[dict[str, Any]], None] = lambda result: None
) -> dict[str, Any]:
  """Times the cases of a config.

  Args:
    config: see `presets.benchmark_config`.
    only: beginnings of the names of those that are wanted; () means all.
    keep: gets all that is known after each case, so that what ends the program later costs nothing of it.

  Returns:
    What the JSON file holds.
  """
  read_config(config.run)
  start_devices()
  known = PEAKS.get(jax.devices()[0].device_kind)
  peak = None
  if known is not None:
    peak = {name: value and value * jax.device_count() for name, value in known._asdict().items()}
  result: dict[str, Any] = {"schema": 1, "about": about(config.name), "limits": {}, "peak": peak, "records": []}
  for case in all_cases(config, only):
    result["limits"] = result["limits"] or measured_limits()
    record = measure(case, windows=config.windows, window_seconds=config.window_seconds)
    result["records"].append(record | utilisation(record, result["limits"], peak))
    print(f"{case.name}: {1e3 * record['median_s']:,.2f} ms", flush=True)
    keep(result)
  if not result["records"]:
    raise InputError(f"--only: no benchmark begins with {' or '.join(only)}")
  return result


def records(folder: pathlib.Path) -> str:
  """The tables of the results in a folder, one for each config, under its name.

  Raises:
    InputError: if there is none, or one cannot be read.
  """
  results = [read_result(path) for path in sorted(folder.glob("*.json"))]
  if not results:
    raise InputError(f"--records: {folder} holds no result of --output")
  configs = dict.fromkeys(result["about"]["config"] for result in results)
  return "\n\n".join(
    f"`{name}`:\n\n{records_table([result for result in results if result['about']['config'] == name])}"
    for name in configs
  )


def read_result(path: pathlib.Path) -> dict[str, Any]:
  """What `--output` of the program wrote.

  Raises:
    InputError: if it is something else.
  """
  try:
    result = read_json(path)
    if result["schema"] != 1:
      raise InputError(f"{path}: expected schema 1, got {result['schema']!r}")
    return result
  except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
    raise InputError(f"{path}: expected what --output wrote, got something else ({error})") from error
