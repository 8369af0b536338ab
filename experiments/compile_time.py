"""What a run compiles before it trains: how many programs, how long each takes, cold and from the persistent cache.

    python experiments/compile_time.py --config_file=hybrid --path=DIR

A run of a few steps a stage goes twice, each time in a process and a workdir of its own: first with an empty cache,
then with what the first has left there. For each place in the program that had something compiled: how many programs,
and the seconds of tracing and lowering them to StableHLO, and of XLA (from the cache: of reading them).
"""

import collections
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback

import jax
from absl import flags

from bbqrec_jax.command_line import start
from bbqrec_jax.presets import load_config
from bbqrec_jax.runs.run import run

_PACKAGE = str(pathlib.Path(__file__).parents[1] / "bbqrec_jax")
# What JAX tells of each program: Python to a jaxpr, a jaxpr to StableHLO, and XLA's part.
_PARTS = {"jaxpr_trace_duration": "trace", "jaxpr_to_mlir_module_duration": "lower", "backend_compile_duration": "xla"}
_STEPS = 3


def place() -> str:
  """The file and function of the package that is being worked on, the innermost two."""
  frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(_PACKAGE)]
  return " < ".join(f"{pathlib.Path(frame.filename).stem}.{frame.name}" for frame in reversed(frames[-2:]))


def measure(config_file: str, path: str, changes: list[str]) -> dict:
  """Runs a few steps of each stage in this process: {place: [programs, trace, lower, xla]}, and the seconds in all."""
  found: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0, 0.0])

  def count(event: str, seconds: float, **_: object) -> None:
    part = _PARTS.get(event.rsplit("/", 1)[-1])
    if part:
      row = found[place()]
      row[0] += part == "xla"
      row[1 + list(_PARTS.values()).index(part)] += seconds

  config = load_config(config_file)
  if path:
    config.data.source, config.data.path = "directory", path
  config.update_from_flattened_dict({
    "tokenizer.steps": _STEPS, "tokenizer.warmup_steps": 1, "tokenizer.evaluate_every": _STEPS,
    "recommender.steps": _STEPS, "recommender.evaluate_every": _STEPS, "evaluation.validation_users": 64,
    "recommender.candidate_similarity.users": 64,
  })  # fmt: skip
  config.update_from_flattened_dict({name: json.loads(value) for name, _, value in (c.partition("=") for c in changes)})
  jax.monitoring.register_event_duration_secs_listener(count)
  with tempfile.TemporaryDirectory() as folder:
    begun = time.monotonic()
    run(config, pathlib.Path(folder) / "run")
    return {"places": found, "seconds": time.monotonic() - begun}


def main(_) -> None:
  """Prints the table, or, in the processes that it starts, what was measured."""
  values = flags.FLAGS
  if values.once:
    print("MEASURED " + json.dumps(measure(values.config_file, values.path, values.change)))
    return
  with tempfile.TemporaryDirectory() as cache:
    results = []
    for _ in range(2):
      command = [sys.executable, __file__, *sys.argv[1:], "--once"]
      kept = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
      done = subprocess.run(command, env=os.environ | kept, stdout=subprocess.PIPE, text=True, check=True)
      (line,) = (line for line in done.stdout.splitlines() if line.startswith("MEASURED "))
      results.append(json.loads(line.removeprefix("MEASURED ")))
  cold, warm = results
  print("| where | programs | traced and lowered | XLA, cold | from the cache |\n|---|---|---|---|---|")
  nothing = [0, 0.0, 0.0, 0.0]
  ranked = sorted(cold["places"], key=lambda name: -sum(cold["places"][name][1:]))
  for name in ranked:
    count, trace, lower, xla = cold["places"][name]
    if trace + lower + xla >= values.least:
      again = warm["places"].get(name, nothing)[3]
      print(f"| `{name}` | {count} | {trace + lower:.1f} s | {xla:.1f} s | {again:.1f} s |")
  for title, result in (("cold", cold), ("from the cache", warm)):
    rows = result["places"].values()
    print(
      f"{title}: {sum(row[0] for row in rows)} programs, {sum(row[1] + row[2] for row in rows):.1f} s traced and"
      f" lowered, {sum(row[3] for row in rows):.1f} s of XLA, {result['seconds']:.1f} s in all"
    )


if __name__ == "__main__":
  flags.DEFINE_string("config_file", "quickstart", "A preset, or a config file.")
  flags.DEFINE_string("path", "", "The data's folder; empty: the config's own data.")
  flags.DEFINE_multi_string("change", [], "FIELD=VALUE of the config, the value as JSON.")
  flags.DEFINE_float("least", 0.5, "Seconds from which on a place has a row.")
  flags.DEFINE_bool("once", False, "Of the processes that this one starts.")
  start(main)
