"""Side by side with what one would pick instead, in one run: time, memory, and what comes out.

    python -m venv /tmp/peers && /tmp/peers/bin/pip install -r experiments/peers/requirements.txt
    /tmp/peers/bin/pip install --no-deps recbole==1.2.1
    python experiments/peers/compare.py --peer_python=/tmp/peers/bin/python --output=peers.json

Each side of a comparison is one process that has compiled and warmed up; they take turns, so that a noisy machine is
noisy for all. Printed and written are the least and the median of the rounds, and the ratio of the medians, over 1
where this project is better. `--only=quantizer,t5` chooses. A peer that does not start is a row that says so.

"t5" searches for histories of 20 items each. With `--sequences=FILE`, a `sequences.txt` of at most 12,101 items, there
is "ranking", too: the same models on histories as long as users really have them, padded here to one of a few lengths
beside others of their length, there to the longest of 16, in the order of the file and in that of their lengths.

Memory is the process's, libraries and all: when the work is done, and at its peak, which is in XLA's compiler on this
project's side.
"""

import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
from typing import Any

from absl import flags
from serving import BLOCKS, HISTORY, ITEM_BATCH, SEARCH_BATCH, STEPS, USERS, real_histories

from bbqrec_jax.command_line import start

FOLDER = pathlib.Path(__file__).parent


class Side:
  """One process that waits for its turn."""

  def __init__(self, python: str, script: str, what: str, sequences: str):
    """Starts it; `what` is what it is to serve, `sequences` where it has real histories from."""
    self._process = subprocess.Popen(
      [python, str(FOLDER / script), what, sequences], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

  def ask(self, command: str) -> list[float]:
    """The answer to one command; empty if the process is gone."""
    assert self._process.stdin is not None
    assert self._process.stdout is not None
    try:
      print(command, file=self._process.stdin, flush=True)
    except BrokenPipeError:
      return []
    return [float(value) for value in self._process.stdout.readline().split()]

  def close(self) -> None:
    """Ends it."""
    self._process.kill()
    self._process.wait()


# Of each comparison: this project's side, the peers, and of each task what one call does, in which unit.
PEERS = {
  "quantizer": (
    "quantizer",
    {"ResidualVQ, averages": "quantizer_averages", "ResidualVQ, learned": "quantizer_learned"},
    {"train": (STEPS, "steps/s"), "tokenize": (BLOCKS * ITEM_BATCH, "items/s")},
  ),
  "t5": (
    "encoder_decoder",
    {"transformers T5": "t5"},
    {"train": (1, "steps/s"), "generate": (4 * SEARCH_BATCH, "users/s")},
  ),
  "ranking": (
    "encoder_decoder",
    {"transformers T5, in order": "t5", "transformers T5, by length": "t5_by_length"},
    {"rank": (USERS, "users/s")},
  ),
  "sasrec": ("sasrec", {"RecBole SASRec": "sasrec"}, {"train": (1, "steps/s")}),
  "causal": ("causal", {}, {"train": (1, "steps/s"), "generate": (4 * SEARCH_BATCH, "users/s")}),
}


def measure(name: str, peer_python: str, rounds: int, sequences: str) -> list[dict[str, Any]]:
  """The rows of one comparison."""
  ours, peers, tasks = PEERS[name]
  sides = {"bbqrec_jax": Side(sys.executable, "ours.py", ours, sequences)}
  if peer_python:
    sides |= {peer: Side(peer_python, "torch_side.py", what, sequences) for peer, what in peers.items()}
  seconds: dict[tuple[str, str], list[float]] = {}
  extra: dict[tuple[str, str], float] = {}
  for turn in range(rounds + 1):
    for task in tasks:
      for side, process in sides.items():
        answer = process.ask(task)
        if turn and answer:  # The first turn compiles and warms up.
          seconds.setdefault((side, task), []).append(answer[0])
          extra |= {(side, task): answer[1]} if len(answer) > 1 else {}
  memory = {side: [process.ask(what) for what in ("resident", "peak")] for side, process in sides.items()}
  for process in sides.values():
    process.close()

  rows = []
  for task, (work, unit) in tasks.items():
    for peer in [side for side in sides if side != "bbqrec_jax"] or [None]:
      row: dict[str, Any] = {"name": f"{name} {task}", "unit": unit, "peer_name": peer}
      for column, side in (("ours", "bbqrec_jax"), ("peer", peer)):
        took = seconds.get((side, task)) if side else None
        if took:
          row[column] = work / statistics.median(took)
          row[f"{column}_best"] = work / min(took)
          row[f"{column}_milliseconds"] = 1000 * statistics.median(took) / (work if unit == "steps/s" else 1)
          row[f"{column}_resident_mib"], row[f"{column}_peak_mib"] = (round(m[0] / 2**20) for m in memory[side])
          if (side, task) in extra:
            row[f"{column}_valid"] = extra[side, task]
      if "peer" in row:
        row["ratio"] = row["ours"] / row["peer"]
      elif peer:
        row["note"] = "the peer did not start: its error is above"
      rows.append(row)
  return rows


def main(argv: list[str]) -> None:
  """Prints a table, and writes it."""
  del argv
  options = flags.FLAGS
  if options.peer_python and not shutil.which(options.peer_python):
    raise SystemExit(f"error: --peer_python: no interpreter at {options.peer_python}; see the head of this file")
  unknown = set(options.only) - set(PEERS)
  if unknown:
    raise SystemExit(f"error: --only: expected some of {', '.join(PEERS)}, got {', '.join(sorted(unknown))}")
  lengths = []
  if options.sequences:
    try:
      lengths = [len(history) for history in real_histories(options.sequences)]
    except (OSError, ValueError) as error:
      raise SystemExit(f"error: --sequences={options.sequences}: {error}") from error
  names = [name for name in options.only if name != "ranking" or lengths]
  rows = [row for name in names for row in measure(name, options.peer_python, options.rounds, options.sequences)]
  about = {"machine": platform.machine(), "processor": platform.processor(), "cores": os.cpu_count(),
           "load": os.getloadavg()[0], "rounds": options.rounds}  # fmt: skip
  if lengths:
    about |= {"histories": len(lengths), "mean length": statistics.mean(lengths), "longest": HISTORY}
  if options.output:
    pathlib.Path(options.output).write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")
  print("| what | peer | unit | ours | peer's | ratio | MiB at the end, ours / peer's | at the peak |")
  print("|---|---|---|---|---|---|---|---|")
  for row in rows:

    def cell(name, form, row=row):
      return format(row[name], form) if name in row else row.get("note", "")

    memory = [f"{cell(f'ours_{when}_mib', 'd')} / {cell(f'peer_{when}_mib', 'd')}" for when in ("resident", "peak")]
    print(
      f"| {row['name']} | {row['peer_name'] or ''} | {row['unit']} | {cell('ours', ',.1f')} | {cell('peer', ',.1f')} |"
      f" {cell('ratio', '.1f')} | {' | '.join(memory)} |"
    )


if __name__ == "__main__":
  flags.DEFINE_string("peer_python", "", "The interpreter of the peers' environment; without it this side runs alone.")
  flags.DEFINE_string("sequences", "", 'A sequences.txt, whose histories are ranked for in "ranking".')
  flags.DEFINE_string("output", "", "Where the rows are written, as JSON.")
  flags.DEFINE_list("only", list(PEERS), "Which comparisons.")
  flags.DEFINE_integer("rounds", 10, "Rounds that are measured.")
  start(main)
