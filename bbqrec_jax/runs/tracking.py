"""A run's figures for trackers: TensorBoard, Weights & Biases, MLflow.

A run writes its figures to `metrics.jsonl` whatever else is installed, and a tracker reads them from there, after the
run or beside it. So nothing that goes wrong with a tracker, its network or its account reaches the training, and a run
that went on from a checkpoint, or was trained elsewhere, is told of once and whole.
"""

import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from bbqrec_jax.errors import InputError
from bbqrec_jax.runs.workdir import load_results
from bbqrec_jax.utils.files import is_given
from bbqrec_jax.utils.json_files import read_json, write_json
from bbqrec_jax.utils.settings import flatten


class Tracker(Protocol):
  """What a tracker is to a run."""

  def begin(self, name: str, config: Mapping[str, Any], *, again: str | None) -> str:
    """Begins a run of a name, or goes on with the one that was called `again`; returns what it is called there."""

  def log(self, stage: str, kind: str, step: int, values: Mapping[str, float]) -> None:
    """The figures of a step."""

  def finish(self, results: Mapping[str, float]) -> None:
    """The figures of the finished run, and the end; an empty mapping where it is not finished."""


class WandB:
  """Weights & Biases; each stage has a step of its own."""

  def __init__(self, project: str, *, offline: bool, folder: pathlib.Path):
    """Files of offline runs, for `wandb sync`, lie in the folder."""
    self._wandb = _package("wandb", "wandb")
    self._project, self._mode, self._folder = project, "offline" if offline else None, folder
    self._run: Any = None

  def begin(self, name: str, config: Mapping[str, Any], *, again: str | None) -> str:
    """See `Tracker`."""
    self._run = self._wandb.init(
      project=self._project,
      name=name,
      config=dict(config),
      id=again,
      resume="allow" if again else None,
      mode=self._mode,
      dir=str(self._folder),
      settings=self._wandb.Settings(silent=True),
    )
    for stage in ("tokenizer", "recommender"):
      self._run.define_metric(f"{stage}/step")
      self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
    return str(self._run.id)

  def log(self, stage: str, kind: str, step: int, values: Mapping[str, float]) -> None:
    """See `Tracker`."""
    self._run.log({f"{stage}/{kind}/{name}": value for name, value in values.items()} | {f"{stage}/step": step})

  def finish(self, results: Mapping[str, float]) -> None:
    """See `Tracker`."""
    self._run.summary.update(dict(results))
    self._run.finish()
    self._wandb.teardown()  # Until then the last records may not be in the file.


class MLflow:
  """MLflow; names there have no "@"."""

  def __init__(self, project: str, *, offline: bool, folder: pathlib.Path):
    """Offline, everything lies in the folder, for `mlflow ui --backend-store-uri`."""
    mlflow = _package("mlflow", "mlflow")
    if offline:
      os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
      mlflow.set_tracking_uri((folder / "mlruns").absolute().as_uri())
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    self._project, self._client, self._metric, self._param = project, MlflowClient(), Metric, Param
    self._run = ""

  def begin(self, name: str, config: Mapping[str, Any], *, again: str | None) -> str:
    """See `Tracker`."""
    if again:
      self._run = again
      return again
    found = self._client.get_experiment_by_name(self._project)
    experiment = found.experiment_id if found else self._client.create_experiment(self._project)
    self._run = self._client.create_run(experiment, run_name=name).info.run_id
    params = [self._param(field, str(value)[:500]) for field, value in config.items()]
    for first in range(0, len(params), 100):  # No more at once.
      self._client.log_batch(self._run, params=params[first : first + 100])
    return self._run

  def log(self, stage: str, kind: str, step: int, values: Mapping[str, float]) -> None:
    """See `Tracker`."""
    self._send({f"{stage}/{kind}/{name}": value for name, value in values.items()}, step)

  def _send(self, values: Mapping[str, float], step: int) -> None:
    now = int(time.time() * 1000)
    metrics = [self._metric(name.replace("@", "_at_"), float(value), now, step) for name, value in values.items()]
    for first in range(0, len(metrics), 1000):
      self._client.log_batch(self._run, metrics=metrics[first : first + 1000])

  def finish(self, results: Mapping[str, float]) -> None:
    """See `Tracker`."""
    self._send(results, 0)
    self._client.set_terminated(self._run, "FINISHED" if results else "RUNNING")


TRACKERS: dict[str, Callable[..., Tracker]] = {"wandb": WandB, "mlflow": MLflow}


def _package(name: str, extra: str) -> Any:
  """A tracker's package.

  Raises:
    InputError: if it is not installed.
  """
  import importlib

  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise InputError(f"{error}: pip install 'bbqrec_jax[{extra}]'") from error


def read_records(path: pathlib.Path, *, first: int = 0) -> Iterator[dict[str, Any]]:
  """The whole records of `metrics.jsonl` from number `first` on; the line that is being written is left out."""
  if not is_given(path):
    return
  with path.open(encoding="utf-8", errors="replace") as file:
    for place, line in enumerate(file):
      if place < first:
        continue
      if not line.endswith("\n"):
        return
      try:
        record = json.loads(line)
        if isinstance(record, dict) and {"stage", "kind", "step"} <= record.keys():
          yield record
      except ValueError:
        continue


def results_figures(workdir: pathlib.Path) -> dict[str, float]:
  """The metrics of a finished run as "test/ndcg@10" and so on; empty where it is not finished.

  Raises:
    InputError: if `results.json` is damaged.
  """
  if not is_given(workdir / "results.json"):
    return {}
  results = load_results(workdir)
  figures = {"best_step": float(results["best_step"])}
  for part, values in results.items():
    if isinstance(values, dict) and part != "data":
      figures |= {f"{part}/{name}": float(value) for name, value in values.items() if isinstance(value, int | float)}
  return figures


def write_board(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Adds the figures and settings of a finished run to its TensorBoard files, for the tab of hyper-parameters.

  Args:
    workdir: of the run, with its results.
    config: its fields, flattened.
  """
  from tensorboardX.event_file_writer import EventsWriter
  from tensorboardX.proto.event_pb2 import Event
  from tensorboardX.summary import hparams, scalar

  figures = results_figures(workdir)
  folder = workdir / "tensorboard" / "results"
  folder.mkdir(parents=True, exist_ok=True)
  told = {
    # A path may hold bytes that are no text, which these files have no place for.
    name: value if isinstance(value, bool | int | float) else str(value).encode("utf-8", "backslashreplace").decode()
    for name, value in config.items()
  }
  writer = EventsWriter(str(folder / "events"))
  try:
    summaries = [*hparams(told, figures), *(scalar(name, value) for name, value in figures.items())]
    for summary in summaries:
      writer.write_event(Event(step=int(figures["best_step"]), wall_time=time.time(), summary=summary))
    writer.flush()
  finally:
    writer.close()


def track(
  workdir: pathlib.Path,
  tracker: Tracker,
  *,
  name: str,
  wait: Callable[[], bool] = lambda: False,
) -> int:
  """Tells a tracker of a run: what it has not been told yet, as `track.json` in the workdir says.

  Args:
    workdir: of the run, which may still be training.
    tracker: that is told.
    name: of the tracker.
    wait: is called when all is told that is there: sleeps, and says whether to look again; until the run is finished.

  Returns:
    How many records were sent.

  Raises:
    InputError: if there is no run.
  """
  note = workdir / "track.json"
  known = read_json(note) if is_given(note) else {}
  mine = known.get(name, {})
  config = flatten(read_json(workdir / "config.json"))
  mine["run"] = tracker.begin(workdir.absolute().name, config, again=mine.get("run"))
  first = sent = mine.get("sent", 0)
  while True:
    finished = is_given(workdir / "results.json")  # Before the records are read, so that the last ones are among them.
    for record in read_records(workdir / "metrics.jsonl", first=sent):
      about = {field: record.pop(field) for field in ("stage", "kind", "step")}
      record.pop("time", None)
      values = {field: value for field, value in record.items() if isinstance(value, int | float)}
      if values:
        tracker.log(**about, values=values)
      sent += 1
    write_json(note, known | {name: mine | {"sent": sent}})
    if finished or not wait():
      break
  tracker.finish(results_figures(workdir))
  return sent - first
