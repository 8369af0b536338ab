"""Two processes of one device each against one process of two devices: how far the same run is apart.

    python experiments/processes.py --output=processes.json [--config_file=configs/quickstart.py]

does the run of a config both ways for each partitioner, with the processes connected over the loopback interface, and
prints the largest differences: of every logged loss and metric, of the best parameters, of the codebooks, of the ranks
that were given to held-out items, and how many semantic IDs differ. The number of devices is the same, so all that is
left is the order in which numbers are added. Extra arguments (`--config.field=value`) go to both.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from bbqrec_jax.command_line import define_path, start
from bbqrec_jax.errors import InputError, refuse
from bbqrec_jax.runs.restore import restore
from bbqrec_jax.utils.files import check_output, read_archive
from bbqrec_jax.utils.json_files import write_json

ROOT = pathlib.Path(__file__).parents[1]
WAYS = {
  "pmap": ["--config.partitioner=pmap"],
  "mesh": ["--config.partitioner=mesh"],
  "mesh_spread": ["--config.partitioner=mesh", "--config.shard_rows=100"],
}


def free_port() -> int:
  """A port of the loopback interface that nobody listens on."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return int(probe.getsockname()[1])


def do(command: list[str], *, processes: int) -> float:
  """Runs a command in one process of two CPU devices, or in two of one each; returns its seconds.

  Raises:
    RuntimeError: if one of them fails.
  """
  flag = f"--xla_force_host_platform_device_count={2 // processes}"
  env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()}
  together = ["--distributed=on", f"--coordinator=localhost:{free_port()}", f"--num_processes={processes}"]
  started = time.monotonic()
  running = [
    subprocess.Popen(
      [*command, *([*together, f"--process_id={index}"] if processes > 1 else [])],
      cwd=ROOT, env=env, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )
    for index in range(processes)
  ]  # fmt: skip
  errors = [process.communicate()[1] for process in running]
  if any(process.returncode for process in running):
    raise RuntimeError("\n".join(errors))
  return time.monotonic() - started


def logged(workdir: pathlib.Path) -> dict[tuple[Any, ...], float]:
  """Every number that a run logged, by stage, kind, step and name."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
  return {
    (line["stage"], line["kind"], line["step"], name): value
    for line in lines
    for name, value in line.items()
    if isinstance(value, int | float) and name not in ("step", "time")
  }


def differences(one: pathlib.Path, other: pathlib.Path) -> dict[str, Any]:
  """How far two runs of one config are apart."""
  first, second = logged(one), logged(other)
  if first.keys() != second.keys():
    raise RuntimeError(f"{one} and {other} logged different things")
  relative = {
    name: abs(value - second[name]) / max(abs(value), abs(second[name]), 1e-3) for name, value in first.items()
  }
  stages = sorted({name[0] for name in first})
  training = {
    stage: max(v for n, v in relative.items() if n[:2] == (stage, "train") and n[3] == "loss") for stage in stages
  }
  left, right = restore(one), restore(other)
  parameters = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), left.params, right.params)
  ranks, others = (read_archive(workdir / "ranks.npz") for workdir in (one, other))
  return {
    "training loss, relative": training,
    "parameters": max(jax.tree.leaves(parameters)),
    "codebooks": float(np.abs(left.ids.codebooks - right.ids.codebooks).max()) if left.ids and right.ids else None,
    "semantic ids that differ": int((left.ids.codes != right.ids.codes).any(1).sum()) if left.ids and right.ids else 0,
    "ranks that differ": int(sum((ranks[name] != others[name]).sum() for name in ranks)),
    "ranks": int(sum(array.size for array in ranks.values())),
  }


def line(row: dict[str, Any]) -> str:
  """A row of the table."""
  losses = ", ".join(f"{stage} {value:.0e}" for stage, value in row["training loss, relative"].items())
  codebooks = "" if row["codebooks"] is None else f"{row['codebooks']:.0e}"
  return (
    f"| {row['partitioner']} | {losses} | {row['parameters']:.0e} | {codebooks} |"
    f" {row['semantic ids that differ']} differ | {row['ranks that differ']} of {row['ranks']:,} differ |"
  )


def parse(argv: list[str]) -> list[str]:
  """Parses this program's flags; all others are left, for the runs."""
  try:
    return list(flags.FLAGS(argv, known_only=True))
  except flags.Error as error:
    told = error.__context__  # What a path is refused with.
    refuse(told if isinstance(told, InputError) else InputError(str(error)))


def main(argv: list[str]) -> None:
  """Does it all and prints a table, a line as soon as it is known."""
  logging.set_verbosity(logging.WARNING)
  options = flags.FLAGS
  rows: list[dict[str, Any]] = []
  print("| partitioner | training loss, relative | parameters | codebooks | semantic IDs | ranks |", flush=True)
  print("|---" * 6 + "|", flush=True)
  for name in options.ways:
    with tempfile.TemporaryDirectory() as folder:
      workdirs = {count: pathlib.Path(folder) / str(count) for count in (1, 2)}
      seconds = {}
      for count, workdir in workdirs.items():
        command = [sys.executable, "-m", "bbqrec_jax.main", f"--config={options.config_file}", f"--workdir={workdir}"]
        seconds[count] = do([*command, *WAYS[name], *argv[1:]], processes=count)
      rows.append({"partitioner": name, **differences(workdirs[1], workdirs[2]), "seconds": list(seconds.values())})
    print(line(rows[-1]), flush=True)
    write_json(options.output, {"rows": rows})


if __name__ == "__main__":
  define_path("output", "The JSON file.", check=check_output)
  flags.DEFINE_string("config_file", "configs/quickstart.py", "The config of the run.")
  flags.DEFINE_list("ways", list(WAYS), "Which partitioners.")
  flags.register_validator("ways", lambda ways: set(ways) <= WAYS.keys(), f"expected some of {', '.join(WAYS)}")
  flags.mark_flags_as_required(["output"])
  start(main, flags_parser=parse)
