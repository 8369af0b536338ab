"""What a run compiles before it trains: how many programs, how long each takes, cold and from the persistent cache.

    python experiments/compile_time.py --config_file=hybrid --path=DIR

A run of a few steps a stage on one device goes twice, each time in a process and a workdir of its own: first with an
empty cache, then with what the first has left there. For each place in the program that had something compiled: how
many programs, and the seconds of tracing and lowering them to StableHLO, and of XLA (from the cache: of reading them).

Of the steps and the rankings, which are the large ones, a second table has the sizes: equations of the jaxpr, those of
loops and branches counted once, operations of StableHLO, and instructions after XLA's passes. `--change` shows what a
layer or a level adds, for instance `--change=recommender.num_layers=4`.
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
from unittest import mock

import jax
from absl import flags
from jax.extend import core

from bbqrec_jax.command_line import start
from bbqrec_jax.presets import load_config
from bbqrec_jax.runs.run import run
from bbqrec_jax.training import partitioning

_PACKAGE = str(pathlib.Path(__file__).parents[1] / "bbqrec_jax")
# What JAX tells of each program: Python to a jaxpr, a jaxpr to StableHLO, and XLA's part.
_PARTS = {"jaxpr_trace_duration": "trace", "jaxpr_to_mlir_module_duration": "lower", "backend_compile_duration": "xla"}
_STEPS = 3


def place() -> str:
  """The file and function of the package that is being worked on, the innermost two."""
  # Without the wrappers that are called "run", of steps and maps, which tell no place from another.
  frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(_PACKAGE) and frame.name != "run"]
  return " < ".join(f"{pathlib.Path(frame.filename).stem}.{frame.name}" for frame in reversed(frames[-2:]))


def equations(jaxpr: core.Jaxpr) -> int:
  """How many equations a program has, with those of its loops, branches and functions."""
  inner = [
    part for equation in jaxpr.eqns for part in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
  ]
  bodies = [part.jaxpr if isinstance(part, core.ClosedJaxpr) else part for part in inner if _is_jaxpr(part)]
  return len(jaxpr.eqns) + sum(map(equations, bodies))


def _is_jaxpr(part: object) -> bool:
  return isinstance(part, core.Jaxpr | core.ClosedJaxpr)


class Sized(partitioning.SingleDevice):
  """A device that notes the sizes of what it compiles as steps and as maps: {place: [equations, operations, ...]}."""

  def __init__(self) -> None:
    """With nothing noted."""
    self.sizes: dict[str, list[int]] = {}

  def _noted(self, jitted):
    compiled: dict[object, jax.stages.Compiled] = {}

    def call(*arguments):
      # Not one of another shape: each is a program of its own.
      shapes = jax.tree.map(lambda leaf: (getattr(leaf, "shape", ()), str(getattr(leaf, "dtype", ""))), arguments)
      key = str(shapes)
      if key not in compiled:
        traced = jitted.trace(*arguments)
        lowered = traced.lower()
        compiled[key] = lowered.compile()
        operations = [line for line in lowered.as_text().splitlines() if " = " in line]
        instructions = [line for line in compiled[key].as_text().splitlines() if " = " in line]
        row = [equations(traced.jaxpr.jaxpr), len(operations), len(instructions)]
        self.sizes[place()] = max(row, self.sizes.get(place(), row))
      return compiled[key](*arguments)

    return call

  def compile_step(self, step):
    """As that of a single device."""
    return self._noted(super().compile_step(step))

  def compile_map(self, function):
    """As that of a single device."""
    return self._noted(super().compile_map(function))


def measure(config_file: str, path: str, changes: list[str]) -> dict:
  """Runs a few steps of each stage in this process.

  Returns:
    `places`: {place: [programs, and seconds of trace, lower, xla]}; `sizes`: see `Sized`; `seconds` in all.
  """
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
  device = Sized()
  config.update_from_flattened_dict({
    "partitioner": "single", "tokenizer.steps": _STEPS, "tokenizer.warmup_steps": 1, "tokenizer.evaluate_every": _STEPS,
    "recommender.steps": _STEPS, "recommender.evaluate_every": _STEPS, "evaluation.validation_users": 64,
    "recommender.candidate_similarity.users": 64,
  })  # fmt: skip
  config.update_from_flattened_dict({name: json.loads(value) for name, _, value in (c.partition("=") for c in changes)})
  jax.monitoring.register_event_duration_secs_listener(count)
  with tempfile.TemporaryDirectory() as folder:
    begun = time.monotonic()
    with mock.patch.dict(partitioning.PARTITIONERS, single=lambda: device):
      run(config, pathlib.Path(folder) / "run")
    return {"places": found, "sizes": device.sizes, "seconds": time.monotonic() - begun}


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
  print("\n| program | equations | StableHLO | after XLA's passes |\n|---|---|---|---|")
  for name, sizes in sorted(cold["sizes"].items(), key=lambda row: -row[1][2]):
    print(f"| `{name}` | " + " | ".join(f"{size:,}" for size in sizes) + " |")
  print()
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
