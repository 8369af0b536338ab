"""Compares finished runs: means over seeds, and paired differences user by user."""

import pathlib
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bbqrec_jax.config import CHANGEABLE
from bbqrec_jax.errors import InputError
from bbqrec_jax.ops.ranking import user_ndcg
from bbqrec_jax.recommender.evaluate import WITHOUT_HISTORY
from bbqrec_jax.runs.workdir import load_results
from bbqrec_jax.utils.files import is_given, read_archive
from bbqrec_jax.utils.json_files import read_json

_NOT_OF_A_SYSTEM = CHANGEABLE | {"seed", "tokenizer.artefact"}  # Fields in which the runs of one system may differ.
_SAME = ("users", "items", "interactions", "split_hash")  # Of results, what says that their users are the same.


class Row(NamedTuple):
  """A system beside the reference.

  Attributes:
    name: of the system.
    seeds: how many runs of it there are.
    metrics: [seeds] of validation and test Recall@10 and NDCG@10, by name.
    without_history: [seeds] of test NDCG@10 where the user's own history is left out of the ranking.
    over: the mean of what its users' test NDCG@10 has over the reference's; None of the reference itself.
    interval: half the width of its 95 % interval over users.
    clear: whether 0 lies outside of the interval that holds for all rows of the table together (Bonferroni).
    best_steps: [seeds].
    minutes: [seeds] of the recommender, with its evaluations.
    parameters: of the recommender; None where its results do not say.
  """

  name: str
  seeds: int
  metrics: dict[str, list[float]]
  without_history: list[float]
  over: float | None
  interval: float
  clear: bool
  best_steps: list[float]
  minutes: list[float]
  parameters: int | None


def systems_of(workdirs: Sequence[pathlib.Path]) -> dict[str, list[pathlib.Path]]:
  """The workdirs by system: those whose configs differ in the seed alone belong together.

  A system is called as its folder; or as the one above it, where the folder's name is a seed, which also tells the
  systems apart where there is no config.

  Raises:
    InputError: if there is none, one is not finished, or one is named twice.
  """
  if not workdirs:
    raise InputError("compare: expected the workdirs of finished runs, got none: bbqrec compare runs/a runs/b")
  keys: dict[str, list[pathlib.Path]] = {}
  for place, workdir in enumerate(workdirs):
    if workdir.resolve() in {other.resolve() for other in workdirs[:place]}:
      raise InputError(f"{workdir}: expected each workdir once, got it again; leave it out")
    if not is_given(workdir / "results.json"):
      raise InputError(f"{workdir} holds no finished run (no results.json): start its command again, or leave it out")
    key = str(workdir.resolve().parent if workdir.name.isdecimal() else workdir.resolve())
    if is_given(workdir / "run.json"):
      fields = read_json(workdir / "run.json")
      key = repr(sorted((name, value) for name, value in fields.items() if name not in _NOT_OF_A_SYSTEM))
    keys.setdefault(key, []).append(workdir)
  named: dict[str, list[pathlib.Path]] = {}
  for folders in keys.values():
    first = folders[0].resolve()
    name = first.parent.name if first.name.isdecimal() else first.name
    name = re.sub(r"(?<=.)[-_. ]?(seed)?[-_. ]?\d+$", "", name) if len(folders) > 1 else name
    named[str(folders[0]) if name in named else name] = folders
  return named


def gains(folders: Sequence[pathlib.Path]) -> np.ndarray:
  """Test NDCG@10 of each user, the mean over the seeds: [U]."""
  ranks = np.stack([read_archive(folder / "ranks.npz")["test"] for folder in folders])
  return np.mean(user_ndcg(ranks), axis=0)


def compare(systems: Mapping[str, Sequence[pathlib.Path]], *, reference: str) -> tuple[dict[str, Any], list[Row]]:
  """What each system reached, and what it has over another.

  Args:
    systems: the finished workdirs of each.
    reference: the system that the others are compared with; without runs, nothing is compared.

  Returns:
    What the results say of the data, and a row per system.

  Raises:
    InputError: if `results.json` or `ranks.npz` is none, or the runs are not of the same data.
  """
  read = {name: [load_results(folder) for folder in folders] for name, folders in systems.items()}
  first, *others = [
    (folder, result) for name in systems for folder, result in zip(systems[name], read[name], strict=True)
  ]
  for folder, result in others:
    if any(result["data"][field] != first[1]["data"][field] for field in _SAME):
      raise InputError(f"{first[0]} and {folder} are runs on different data sets: compare those of each by themselves")
  base = gains(systems[reference]) if systems.get(reference) else None
  rows, normal, compared = [], statistics.NormalDist(), max(len(systems) - 1, 1)
  for name, results in read.items():
    over, interval, clear = None, 0.0, False
    if base is not None and name != reference:
      paired = gains(systems[name]) - base
      over, error = float(paired.mean()), float(paired.std(ddof=1) / np.sqrt(len(paired)))
      interval, clear = 1.96 * error, abs(over) > normal.inv_cdf(1 - 0.025 / compared) * error
    metrics = {
      f"{part} {metric}": [result[part][metric] for result in results]
      for part in ("validation", "test")
      for metric in ("recall@10", "ndcg@10")
    }
    without = [result["test" + WITHOUT_HISTORY]["ndcg@10"] for result in results]
    steps = [float(result["best_step"]) for result in results]
    minutes = [(r["seconds"]["recommender"] + r["seconds"]["evaluation"]) / 60 for r in results]
    rows.append(
      Row(name, len(results), metrics, without, over, interval, clear, steps, minutes, results[0].get("parameters"))
    )
  return first[1]["data"], rows


def mean(values: list[float], form: str) -> str:
  """Mean, and from two values on the standard deviation, in a `form` such as ".3f"."""
  if not values or None in values:
    return ""
  spread = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
  return f"{np.mean(values):{form}}{spread}"


def table(rows: list[list[str]]) -> str:
  """A Markdown table; the first row is its head."""
  lines = [f"| {' | '.join(row)} |" for row in rows]
  return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _cells(rows: Sequence[Row], *, reference: str) -> list[list[str]]:
  head = ["system", "seeds", "validation Recall@10", "NDCG@10", "test Recall@10", "NDCG@10",
          f"NDCG@10 over {reference}", "best step", "minutes", "parameters", "NDCG@10 without own history"]  # fmt: skip
  return [head] + [
    [
      row.name,
      str(row.seeds),
      *(mean(values, ".4f") for values in row.metrics.values()),
      "" if row.over is None else f"{row.over:+.4f} ± {row.interval:.4f}" + ("" if row.clear else " n.s."),
      mean(row.best_steps, ".0f"),
      mean(row.minutes, ".1f"),
      "" if row.parameters is None else f"{row.parameters:,}",
      mean(row.without_history, ".4f"),
    ]
    for row in rows
  ]


def to_markdown(data: Mapping[str, Any], rows: Sequence[Row], *, reference: str) -> str:
  """The data in a line, the table, and what its marks mean."""
  head = "{name}: {users:,} users, {items:,} items, {interactions:,} interactions, split {split_hash}".format(**data)
  parts = [head, table(_cells(rows, reference=reference))]
  if any(row.over is not None and not row.clear for row in rows):
    parts.append("n.s.: 0 is possible, where all comparisons are to hold together at 95 % (Bonferroni).")
  return "\n\n".join(parts)


def to_latex(rows: Sequence[Row], *, reference: str) -> str:
  """The table for LaTeX with booktabs."""

  def escaped(cell: str) -> str:
    words = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "±": r"$\pm$"}
    return re.sub(r"[&%$#_{}\\^~±]", lambda found: words.get(found[0], f"\\{found[0]}"), cell)

  head, *body = [" & ".join(map(escaped, cells)) + r" \\" for cells in _cells(rows, reference=reference)]
  columns = "lr" + "r" * (len(_cells(rows, reference=reference)[0]) - 2)
  return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule",
                    r"\end{tabular}", ""])  # fmt: skip


def figure(rows: Sequence[Row], *, reference: str) -> Any:
  """What each system has over the reference, with its interval: a figure of matplotlib."""
  from matplotlib.figure import Figure

  shown = [row for row in rows if row.over is not None]
  made = Figure(figsize=(6, 1 + 0.4 * len(shown)), layout="constrained")
  panel = made.subplots()
  panel.errorbar(
    [row.over or 0.0 for row in shown], range(len(shown)), xerr=[row.interval for row in shown], fmt="o", capsize=3
  )
  panel.set_yticks(range(len(shown)), [row.name for row in shown])
  panel.invert_yaxis()
  panel.axvline(0, color="grey", linewidth=0.5)
  panel.set_xlabel(f"test NDCG@10 over {reference}, 95 % interval over users")
  return made
