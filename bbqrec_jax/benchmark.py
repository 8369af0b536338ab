"""Times everything on whatever JAX sees: `python -m bbqrec_jax.benchmark --config=configs/benchmark.py:small`.

    python -m bbqrec_jax.benchmark --config=configs/benchmark.py:small --output=small.json
    python -m bbqrec_jax.benchmark --compare=small.json,other.json
    python -m bbqrec_jax.benchmark --records=DIR

prints a table, and writes `small.json` and, where matplotlib is there, `small.png`. `--only=tokenizer,causal/dense`
chooses by the beginning of the names. `--compare` prints the ratios of two such files, `--records` one table of all
those in a folder, for each config.

The JSON holds `schema` (1), `about` (versions, device kind and count, of a CPU its model, cores, load, commit),
`limits` (the rates of a large product and of a copy that were measured in the same process, on one device), `peak` (the
data sheet's, of all devices; null where it is not known) and `records`, see `benchmarks.timing.measure` and
`benchmarks.report.utilisation`.
"""

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
from absl import flags
from ml_collections import config_flags

import bbqrec_jax
from bbqrec_jax.benchmarks.cases import all_cases
from bbqrec_jax.benchmarks.limits import PEAKS, measured_limits
from bbqrec_jax.benchmarks.report import chart, comparison, records_table, table, utilisation
from bbqrec_jax.benchmarks.timing import measure
from bbqrec_jax.command_line import define_path, quiet_flags, start, writing
from bbqrec_jax.config import read_config
from bbqrec_jax.errors import InputError, refuse
from bbqrec_jax.utils.environment import settle_jax, start_devices
from bbqrec_jax.utils.files import check_output, local_path
from bbqrec_jax.utils.host_memory import keep_memory
from bbqrec_jax.utils.json_files import read_json, write_json


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
    config: see `configs/benchmark.py`.
    only: beginnings of the names of those that are wanted; () means all.
    keep: gets all that is known after each case, so that what ends the program later costs nothing of it.

  Returns:
    What the JSON file holds.

  Raises:
    InputError: if the config is wrong, or JAX cannot start (see `start_devices`).
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
  results = [_read(path) for path in sorted(folder.glob("*.json"))]
  if not results:
    raise InputError(f"--records: {folder} holds no result of --output")
  configs = dict.fromkeys(result["about"]["config"] for result in results)
  return "\n\n".join(
    f"`{name}`:\n\n{records_table([result for result in results if result['about']['config'] == name])}"
    for name in configs
  )


def main(argv: list[str]) -> None:
  """Times, or compares."""
  del argv
  options = quiet_flags()
  keep_memory()
  settle_jax()
  try:
    if options.compare:
      if len(options.compare) != 2:
        raise InputError(f"--compare: expected two files, got {len(options.compare)}")
      print(comparison(*(_read(local_path(name, flag="compare")) for name in options.compare)))
      return
    if options.records:
      print(records(options.records))
      return
    if options.config is None or "run" not in options.config:
      raise InputError(
        "--config: expected configs/benchmark.py:small, :paper or :large, or one like it, which holds what is timed"
        " beside the config of a run; or give --compare with two files"
      )
    output = options.output

    def keep(result: dict[str, Any]) -> None:
      if output:
        with writing(output):
          write_json(output, result)

    result = run(options.config, only=tuple(options.only), keep=keep)
  except InputError as error:
    refuse(error)
  print(table(result))
  if output is None:
    return
  try:
    with writing(output):
      chart(result).savefig(output.with_suffix(".png"), dpi=120)
  except ModuleNotFoundError:
    print("no chart: it needs matplotlib, pip install 'bbqrec_jax[report]'")


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    result = read_json(path)
    if result["schema"] != 1:
      raise InputError(f"{path}: expected schema 1, got {result['schema']!r}")
    return result
  except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
    raise InputError(f"{path}: expected what --output wrote, got something else ({error})") from error


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "configs/benchmark.py:small, :paper or :large.")
  define_path("output", "The JSON file; a chart of the same name stands beside it.", check=check_output)
  flags.DEFINE_list("only", [], "Beginnings of the names of what to time.")
  flags.DEFINE_list("compare", [], "Two files to compare instead.")
  define_path("records", "A folder of such files, to print one table of instead.")
  start(main)
