r"""Minutes, core-seconds and memory until a validation NDCG@10 is reached, beside what one would pick instead.

    python -m venv /tmp/peers && /tmp/peers/bin/pip install -r experiments/peers/requirements.txt
    /tmp/peers/bin/pip install --no-deps recbole==1.2.1
    OMP_NUM_THREADS=1 taskset -c 1 python experiments/peers/time_to_quality.py --peer_python=/tmp/peers/bin/python \
      --data=DIR --data=DIR --output=quality.json --picture=quality.png

Every system trains by itself, in a process of its own and in the settings that its makers recommend, on all but the
last two items of each history, until it stops by itself or `--limit_minutes` are over. Each of its validations is a
point of its curve. All are judged alike: every user's item before the last, ranked among all items, those of the
history too. The clocks run from the start of the process; imports, compilation (nothing is kept from earlier runs) and
the validations that a system does to stop by are on them. What it would not do by itself, such as the ranking of all
users where it picks by a sample, is not. On a core that others use, too, minutes are too many, and core-minutes hold.

Systems take turns in the order of `--only`, one at a time. What `--output` has already is not measured again, but
shown: the same command goes on after an end, or draws the picture of what is there. A system that does not start is a
row with the last line of its error. The data is of the format of `docs/data.md`, sequences.txt and features.
"""

import json
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from bbqrec_jax.command_line import define_path, start
from bbqrec_jax.errors import InputError, refuse

FOLDER = pathlib.Path(__file__).parent
# Name: what it is called, whether it runs in the peers' environment, what it knows items by.
SYSTEMS = {
  "recbole_sasrec": ("RecBole SASRec", True, "number"),
  "cornac_sasrec": ("cornac SASRec", True, "number"),
  "cornac_tiger": ("cornac TIGER", True, "text features"),
  "sasrec": ("`sasrec`", False, "number"),
  "sasrec_features": ("`sasrec_features`", False, "number, features"),
  "dense": ("`dense`", False, "number, features, titles"),
}
CLOCKS = {
  "seconds": "minutes since the process was started",
  "core_seconds": "core-minutes since the process was started",
}
REFERENCE, SHARE = "recbole_sasrec", 0.9  # Thresholds are of what this one reaches.


def best(curve: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
  """The row of the highest NDCG@10, the first of several; None of none."""
  return max(curve, key=lambda row: row["ndcg@10"], default=None)


def first_reaching(curve: Sequence[Mapping[str, Any]], ndcg: float) -> Mapping[str, Any] | None:
  """The first row of a curve, in the order of time, whose NDCG@10 is at least that; None if there is none."""
  return next((row for row in curve if row["ndcg@10"] >= ndcg), None)


def read_curve(path: pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """What a system's process has written: what it is, and its rows; a last line that was cut off is left out."""
  about: dict[str, Any] = {}
  rows = []
  for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else ():
    if line.endswith("\n"):
      record = json.loads(line)
      if "about" in record:
        about = record["about"]
      else:
        rows.append(record)
  return about, rows


def measure(system: str, data: pathlib.Path, *, peer_python: str, limit_minutes: float, changes: Sequence[str]) -> dict:
  """One system on one data set, in a process of its own.

  Args:
    system: of SYSTEMS.
    data: the folder of the data set.
    peer_python: the interpreter of the peers' environment.
    limit_minutes: wall minutes, by the clock on the wall, after which it is stopped; 0: none.
    changes: FIELD=JSON, settings that differ from the recommended ones.

  Returns:
    `data`, `system`, `end` (how it ended), `about` (versions and settings), `load` (of the machine in the minute
    before, and in its last), `curve`.
  """
  of_peer = SYSTEMS[system][1]
  script = FOLDER / ("quality_peers.py" if of_peer else "quality_ours.py")
  load = os.getloadavg()[0]
  with tempfile.TemporaryDirectory() as folder:
    curve, errors = pathlib.Path(folder, "curve.jsonl"), pathlib.Path(folder, "errors.txt")
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled", "TMPDIR": folder}
    command = [peer_python if of_peer else sys.executable, str(script), system, str(data.absolute()), str(curve)]
    with errors.open("w") as file:
      process = subprocess.Popen(
        [*command, *changes], stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, cwd=folder
      )
      try:
        status = process.wait(limit_minutes * 60 or None)
        end = "stopped by itself"
      except subprocess.TimeoutExpired:
        status, end = 0, f"at the limit of {limit_minutes:g} minutes"
      finally:
        process.kill()
        process.wait()
    if status:
      lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
      end = f"failed: {lines[-1] if lines else f'status {status}'}"
    about, rows = read_curve(curve)
  loads = [round(load, 2), round(os.getloadavg()[0], 2)]
  return {"data": data.name, "system": system, "end": end, "about": about, "load": loads, "curve": rows}


def to_markdown(results: Sequence[Mapping[str, Any]]) -> str:
  """The table of what was measured: a row for each data set and system.

  Times are minutes / core-minutes, at the first validation that reaches a quality; a dash stands where none did.
  """
  lines = [
    f"| data | system | knows items by | {SHARE:.0%} of RecBole's best after | RecBole's best after |"
    " its own best after | Recall@10 / NDCG@10 of that | in all | peak MiB | it ended |",
    "|---|---|---|---|---|---|---|---|---|---|",
  ]

  def spent(row: Mapping[str, Any] | None) -> str:
    return f"{row['seconds'] / 60:.1f} / {row['core_seconds'] / 60:.1f}" if row else "–"

  for result in results:
    name, _, items = SYSTEMS[result["system"]]
    curve, top, goal = result["curve"], best(result["curve"]), reference_best(results, result["data"])
    reached = [spent(first_reaching(curve, share * goal) if goal else None) for share in (SHARE, 1.0)]
    quality = f"{top['recall@10']:.4f} / {top['ndcg@10']:.4f}" if top else "–"
    peak = f"{max(row['peak_mib'] for row in curve):,}" if curve else "–"
    cells = [result["data"], name, items, *reached, spent(top), quality, spent(curve[-1] if curve else None), peak]
    lines.append(f"| {' | '.join([*cells, result['end']])} |")
  return "\n".join(lines)


def shares(results: Sequence[Mapping[str, Any]]) -> list[str]:
  """A line for each data set that has the reference: by how much less work others reach its best NDCG@10."""
  lines = []
  for one in results:
    top = best(one["curve"])
    if one["system"] != REFERENCE or top is None:
      continue
    others = []
    for other in results:
      row = first_reaching(other["curve"], top["ndcg@10"])
      if other["data"] == one["data"] and other is not one and row:
        others.append(f"{SYSTEMS[other['system']][0]} 1/{top['core_seconds'] / row['core_seconds']:.1f}")
    lines.append(
      f"{one['data']}: RecBole's best NDCG@10, {top['ndcg@10']:.4f} ({one['end']}), took it"
      f" {top['core_seconds'] / 60:.1f} core-minutes; others needed, of these: {', '.join(others) or 'none got there'}"
    )
  return lines


def reference_best(results: Sequence[Mapping[str, Any]], data: str) -> float:
  """The highest NDCG@10 of the reference on a data set; 0 where it has none."""
  curves = [one["curve"] for one in results if (one["data"], one["system"]) == (data, REFERENCE)]
  top = best(curves[0]) if curves else None
  return top["ndcg@10"] if top else 0.0


def draw(results: Sequence[Mapping[str, Any]], path: pathlib.Path, *, clock: str = "seconds") -> None:
  """A PNG with a panel for each data set and a curve for each system: NDCG@10 over minutes, these in logarithms.

  Args:
    results: of `measure`.
    path: of the picture.
    clock: of CLOCKS.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot, ticker

  names = list(dict.fromkeys(result["data"] for result in results))
  figure, panels = pyplot.subplots(1, len(names), figsize=(5.2 * len(names), 4.8), squeeze=False)
  colours = dict(zip(SYSTEMS, ("#d62728", "#ff7f0e", "#8c564b", "#1f77b4", "#17becf", "#2ca02c"), strict=True))
  for panel, name in zip(panels[0], names, strict=True):
    for result in results:
      if result["data"] != name or not result["curve"]:
        continue
      minutes = [row[clock] / 60 for row in result["curve"]]
      quality = [row["ndcg@10"] for row in result["curve"]]
      system = result["system"]
      label = SYSTEMS[system][0].strip("`") + ("" if result["end"] == "stopped by itself" else " (not to its end)")
      panel.plot(minutes, quality, marker=".", markersize=4, linewidth=1.5, color=colours[system], label=label)
    goal = reference_best(results, name)
    if goal:
      panel.axhline(goal, color=colours[REFERENCE], linewidth=0.8, linestyle=":")
    panel.set(xscale="log", title=name, xlabel=CLOCKS[clock], ylim=(0, None))
    panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    panel.xaxis.set_minor_locator(ticker.NullLocator())
    panel.grid(alpha=0.3)
    if panel.get_lines():
      panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
  panels[0][0].set_ylabel("validation NDCG@10, all users, all items")
  figure.tight_layout()
  figure.savefig(path, dpi=100)
  pyplot.close(figure)


def read_results(path: pathlib.Path) -> list[dict[str, Any]]:
  """What a file of this script holds; nothing if it is not there yet.

  Raises:
    InputError: if it is another file.
  """
  if not path.exists():
    return []
  try:
    return list(json.loads(path.read_text(encoding="utf-8"))["results"])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(f"--output: {path} is no file of this script ({error!r}); name another") from error


def ordered(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """By data set, in the order in which these were first measured, and by system, in that of SYSTEMS."""
  names, systems = list(dict.fromkeys(result["data"] for result in results)), list(SYSTEMS)
  return sorted(results, key=lambda result: (names.index(result["data"]), systems.index(result["system"])))


def write_results(path: pathlib.Path, results: Sequence[Mapping[str, Any]]) -> None:
  """Writes what was measured, and on what: JSON, a line for each validation."""
  about = {
    "machine": platform.machine(), "processor": processor(), "cores": os.cpu_count(),
    "cores of the processes": len(os.sched_getaffinity(0)), "threads": os.environ.get("OMP_NUM_THREADS", ""),
    "python": platform.python_version(),
  }  # fmt: skip
  parts = []
  for result in results:
    rows = ",\n".join(f"   {json.dumps(row)}" for row in result["curve"])
    head = json.dumps({key: value for key, value in result.items() if key != "curve"})
    parts.append(f'  {head[:-1]}, "curve": [\n{rows}\n  ]}}')
  text = f'{{"about": {json.dumps(about)},\n "results": [\n' + ",\n".join(parts) + "\n ]}\n"
  unfinished = path.with_name(path.name + ".unfinished")
  unfinished.write_text(text, encoding="utf-8")
  os.replace(unfinished, path)


def processor() -> str:
  """What the machine calls its processor; Linux only."""
  lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
  return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def check(options: Any) -> None:
  """Looks at everything that was given, before anything is measured.

  Raises:
    InputError: if something of it cannot be.
  """
  unknown = [name for name in options.only if name not in SYSTEMS]
  if unknown:
    raise InputError(f"--only: expected some of {', '.join(SYSTEMS)}, got {', '.join(unknown)}")
  if options.limit_minutes < 0:
    raise InputError(f"--limit_minutes: expected minutes, or 0 for no limit, got {options.limit_minutes:g}")
  peers = [name for name in options.only if SYSTEMS[name][1]]
  if peers and not options.peer_python:
    raise InputError(f"--peer_python: {', '.join(peers)} need the peers' interpreter; see the head of this file")
  if peers and not shutil.which(options.peer_python):
    raise InputError(f"--peer_python: no interpreter at {options.peer_python}; see the head of this file")
  for name in options.data:
    if not pathlib.Path(name, "sequences.txt").is_file():
      raise InputError(f"--data: {name} has no sequences.txt; expected a folder of the format of docs/data.md")
  for change in options.change:
    try:
      json.loads(change.partition("=")[2])
    except ValueError as error:
      raise InputError(f"--change: expected FIELD=JSON, got {change} ({error})") from error
  if not options.output.absolute().parent.is_dir():
    raise InputError(f"--output: no folder {options.output.absolute().parent}")


def main(argv: list[str]) -> None:
  """Measures what is not measured yet; prints the table, draws the picture."""
  del argv
  options = flags.FLAGS
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # What was started is ended with it.
  try:
    check(options)
    results = read_results(options.output)
  except InputError as error:
    refuse(error)
  done = {(result["data"], result["system"]) for result in results}
  for data in map(pathlib.Path, options.data):
    for system in options.only:
      if (data.absolute().name, system) in done:
        continue
      results.append(
        measure(
          system, data.absolute(), peer_python=options.peer_python, limit_minutes=options.limit_minutes,
          changes=options.change,
        )
      )  # fmt: skip
      write_results(options.output, results)
      print(to_markdown(results[-1:]).splitlines()[-1], flush=True)
  results = ordered(results)
  print("\n".join([to_markdown(results), "", *shares(results)]))
  if options.picture and results:
    draw(results, options.picture, clock=options.clock)


if __name__ == "__main__":
  flags.DEFINE_multi_string("data", [], "The folder of a data set; may be given several times.")
  flags.DEFINE_string("peer_python", "", "The interpreter of the peers' environment.")
  define_path("output", "Where what is measured is kept, as JSON; what is there already is not measured again.")
  define_path("picture", "Where the curves are drawn, a PNG.")
  flags.DEFINE_enum("clock", "seconds", list(CLOCKS), "What the picture has below: minutes or core-minutes.")
  flags.DEFINE_list("only", list(SYSTEMS), "Which systems, in which order.")
  flags.DEFINE_float("limit_minutes", 0.0, "Wall minutes after which a system is stopped; 0: none.")
  flags.DEFINE_multi_string("change", [], "FIELD=JSON: a setting that differs from the recommended ones; for trials.")
  flags.mark_flags_as_required(["output"])
  start(main)
