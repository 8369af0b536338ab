"""Where a run's figures go: JSON lines, TensorBoard, and a progress bar or plain lines."""

import datetime
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Mapping
from typing import IO, Any

import tensorboardX
import tqdm


def say(message: str) -> None:
  """One message to the person at the terminal; does not break a progress bar."""
  tqdm.tqdm.write(message, file=sys.stdout)
  sys.stdout.flush()


class MetricsLog:
  """Appends each record to `metrics.jsonl` and to TensorBoard files."""

  def __init__(self, workdir: pathlib.Path):
    """Opens both in `workdir`."""
    self._file: IO[str] = open(workdir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
    self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"))

  def write(self, stage: str, kind: str, step: int, values: Mapping[str, float]) -> None:
    """One record: `stage` tokenizer or recommender, `kind` train or validation."""
    record = {"stage": stage, "kind": kind, "step": step, "time": time.time(), **values}
    self._file.write(json.dumps(record) + "\n")
    self._file.flush()
    for name, value in values.items():
      self._board.add_scalar(f"{stage}/{kind}/{name}", value, step)

  def close(self) -> None:
    """Flushes and closes."""
    self._file.close()
    self._board.close()


class Progress:
  """A bar with rate and time left on a terminal; a plain line now and then otherwise."""

  def __init__(self, name: str, *, total: int, done: int):
    """`done` of `total` steps are behind us."""
    self._name, self._total, self._done, self._first = name, total, done, done
    self._start = time.monotonic()
    self._bar: Any = None
    if sys.stdout.isatty():
      # With the usual fallback where the terminal gives no size; tqdm alone would show nothing there.
      size = shutil.get_terminal_size()
      self._bar = tqdm.tqdm(
        total=total, initial=done, desc=name, unit="step", file=sys.stdout, ncols=size.columns, nrows=size.lines
      )

  def advance(self) -> None:
    """One step is done."""
    self._done += 1
    if self._bar is not None:
      self._bar.update()

  def report(self, values: Mapping[str, float]) -> None:
    """Shows the latest metrics."""
    if self._bar is not None:
      self._bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()})
      return
    seconds = time.monotonic() - self._start
    rate = (self._done - self._first) / max(seconds, 1e-9)
    left = datetime.timedelta(seconds=round((self._total - self._done) / rate)) if rate else "?"
    shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
    say(f"{self._name} {self._done}/{self._total}  {shown}  {rate:.1f} steps/s  {left} left")

  def close(self) -> None:
    """Leaves the bar as it stands."""
    if self._bar is not None:
      self._bar.close()
