"""Runs in a list: how far each is, what it reached, and in which settings they differ."""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from bbqrec_jax.errors import InputError
from bbqrec_jax.runs.compare import table
from bbqrec_jax.runs.workdir import load_results
from bbqrec_jax.utils.files import is_given
from bbqrec_jax.utils.json_files import read_json
from bbqrec_jax.utils.settings import flatten

_DEEPEST = 6  # Folders below a given one that are looked into.
_UNTOLD = {"data.path", "keep_checkpoints", "log_every", "steps_per_call"}  # Fields that make no other run.
METRICS = ("recall@10", "ndcg@10")


class Listed(NamedTuple):
  """A run of the list.

  Attributes:
    workdir: of the run.
    state: "finished", how far it is, or "damaged".
    fields: of its config, flattened; empty where that cannot be read.
    data: the name of its data; "" where it has not said yet.
    figures: "validation ndcg@10" and so on, and "minutes"; empty until it is finished.
    fault: what is wrong with a damaged one, in a line; "" of others.
  """

  workdir: pathlib.Path
  state: str
  fields: dict[str, Any]
  data: str
  figures: dict[str, float]
  fault: str = ""


def find_workdirs(folders: Sequence[pathlib.Path]) -> list[pathlib.Path]:
  """The workdirs among folders and in them, each once, in order; a workdir is not looked into.

  Raises:
    InputError: if a folder is none, or holds no run.
  """
  found: dict[pathlib.Path, pathlib.Path] = {}

  def within(folder: pathlib.Path, depth: int) -> Iterator[pathlib.Path]:
    if is_given(folder / "run.json") and is_given(folder / "config.json"):
      yield folder
    elif depth:
      try:
        below = sorted(one for one in folder.iterdir() if one.is_dir() and not one.is_symlink())
      except OSError:  # Somebody else's, or gone by now.
        return
      for one in below:
        yield from within(one, depth - 1)

  for folder in folders:
    if not folder.is_dir():
      raise InputError(f"{folder}: expected a folder with runs, found none; check the path")
    own = list(within(folder, _DEEPEST))
    if not own:
      raise InputError(f"{folder}: expected a workdir of bbqrec train, or a folder with some, found none")
    found |= {workdir.resolve(): workdir for workdir in own}
  return list(found.values())


def _progress(workdir: pathlib.Path, fields: dict[str, Any]) -> str:
  """How far a run is that is not finished: the last record of its metrics."""
  from bbqrec_jax.runs.tracking import read_records

  last = None
  for last in read_records(workdir / "metrics.jsonl"):  # noqa: B007
    pass
  if last is None:
    return "not begun"
  return f"{last['stage']} {last['step']}/{fields.get(last['stage'] + '.steps', '?')}"


def read_run(workdir: pathlib.Path) -> Listed:
  """A run as the list has it, of any version; one with a damaged file is no reason to refuse the others."""
  fields: dict[str, Any] = {}
  try:
    fields = flatten(read_json(workdir / "config.json"))
    if not is_given(workdir / "results.json"):
      return Listed(workdir, _progress(workdir, fields), fields, "", {})
    results = load_results(workdir)
  except (InputError, OSError) as error:
    return Listed(workdir, "damaged", fields, "", {}, fault=str(InputError(str(error))))
  figures = {f"{part} {metric}": results[part][metric] for part in ("validation", "test") for metric in METRICS}
  figures["minutes"] = sum(results["seconds"].values()) / 60
  return Listed(workdir, "finished", fields, results["data"]["name"], figures)


def differing(runs: Sequence[Listed]) -> list[str]:
  """The config fields that not all runs have the same value of, among those whose config can be read."""
  runs = [run for run in runs if run.fields]
  names = dict.fromkeys(name for run in runs for name in run.fields if name not in _UNTOLD)
  return [name for name in names if len({repr(run.fields.get(name)) for run in runs}) > 1]


def sort_runs(runs: Sequence[Listed], by: str) -> list[Listed]:
  """The runs by a figure, the best first and those without it last; as they are where `by` is ""."""
  if not by:
    return list(runs)
  turn = 1 if by == "minutes" else -1
  return sorted(runs, key=lambda run: (by not in run.figures, turn * run.figures.get(by, 0.0)))


def to_rows(runs: Sequence[Listed]) -> list[dict[str, Any]]:
  """A dictionary a run, for other programs."""
  fields = differing(runs)
  return [
    {"workdir": str(run.workdir), "state": run.state, "data": run.data, **run.figures}
    | ({"fault": run.fault} if run.fault else {})
    | {"config": {name: run.fields.get(name) for name in fields}}
    for run in runs
  ]


def to_table(runs: Sequence[Listed]) -> str:
  """A Markdown table: a line a run, a column a figure and a differing field; below it a line for each damaged run."""
  fields = differing(runs)
  short = [name if sum(name.split(".")[-1] == one.split(".")[-1] for one in fields) > 1 else name.split(".")[-1]
           for name in fields]  # fmt: skip
  parts = [f"{part} {metric}" for part in ("validation", "test") for metric in METRICS]
  rows = [["run", "state", "data", *parts, "minutes", *short]]
  for run in runs:
    figures = [f"{run.figures[name]:.4f}" if name in run.figures else "" for name in parts]
    minutes = f"{run.figures['minutes']:.1f}" if run.figures else ""
    values = ["" if name not in run.fields else _shown(run.fields[name]) for name in fields]
    rows.append([str(run.workdir), run.state, run.data, *figures, minutes, *values])
  faults = [f"{run.workdir} is damaged: {run.fault}" for run in runs if run.fault]
  return "\n".join([table(rows), *([""] if faults else []), *faults])


def _shown(value: Any) -> str:
  text = ",".join(map(str, value)) or "()" if isinstance(value, list | tuple) else str(value)
  return text.replace("|", "\\|")
