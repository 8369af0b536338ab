"""Logs of a run: JSON lines, TensorBoard, and a progress bar or plain lines."""

import datetime
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

import tqdm
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from bbqrec_jax.utils import processes
from bbqrec_jax.utils.files import unfinished
from bbqrec_jax.utils.messages import is_heard, say, warn


class MetricsLog:
  """Appends each record to `metrics.jsonl` and to TensorBoard files.

  A record is a line `{"stage", "kind", "step", "time", ...}`, and none stands there twice: what a run logged past the
  checkpoint that it goes on from is dropped, and so is a line that was cut off. Of several processes the first writes,
  and the others write nowhere.
  """

  def __init__(self, workdir: pathlib.Path):
    """Opens `metrics.jsonl` in `workdir`; the TensorBoard files of a stage are opened by `resume`."""
    self._path, self._boards = workdir / "metrics.jsonl", workdir / "tensorboard"
    if not processes.is_first():
      self._path = pathlib.Path(os.devnull)
    self._keep(lambda record: True)
    self._file: IO[str] = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
    self._board: EventsWriter | None = None

  def resume(self, stage: str, step: int, *, evaluated_step: int) -> None:
    """Begins a stage, or goes on with it.

    Args:
      stage: that the records from now on are of.
      step: the last one of its steps that counts; what was logged of later ones is dropped.
      evaluated_step: the same of its evaluations.
    """
    self._close_board()
    self._file.close()
    last = {"validation": evaluated_step}
    self._keep(lambda record: record["stage"] != stage or record["step"] <= last.get(record["kind"], step))
    self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
    if not processes.is_first():
      return
    folder = self._boards / stage
    folder.mkdir(parents=True, exist_ok=True)
    # Not tensorboardX's SummaryWriter: its thread dies of a full disk, and whoever writes then waits for it for ever.
    self._board = EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}")
    # Tells TensorBoard to hide what older files have from this step on.
    self._board.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

  def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrites the file without the records that are not wanted and without what is no record."""
    if not self._path.is_file():
      return
    lines = self._path.read_bytes().splitlines(keepends=True)
    kept, broken = [], 0
    for line in lines:
      try:
        if not line.endswith(b"\n"):
          raise ValueError("cut off")
        if wanted(json.loads(line)):
          kept.append(line)
      except (ValueError, KeyError, TypeError):
        broken += 1
    if broken:
      warn(f"{self._path}: dropped {broken} of {len(lines)} lines that are no whole records")
    if len(kept) < len(lines):
      unfinished(self._path).write_bytes(b"".join(kept))
      os.replace(unfinished(self._path), self._path)

  def write(self, stage: str, kind: str, step: int, values: Mapping[str, Any]) -> None:
    """One record; its numbers go to TensorBoard too.

    Args:
      stage: tokenizer or recommender.
      kind: "train" or "validation" for metrics, or what happened: "spike", "skipped", "diverged".
      step: of the stage.
      values: what JSON can hold.
    """
    now = time.time()
    record = {"stage": stage, "kind": kind, "step": step, "time": now, **values}
    self._file.write(json.dumps(record) + "\n")
    self._file.flush()
    if self._board is not None:
      for name, value in values.items():
        if isinstance(value, int | float):
          self._board.write_event(Event(step=step, wall_time=now, summary=scalar(f"{stage}/{kind}/{name}", value)))
      if kind != "train":
        self._board.flush()

  def _close_board(self) -> None:
    if self._board is not None:
      self._board.close()
      self._board = None

  def close(self) -> None:
    """Flushes and closes."""
    try:
      self._file.close()
    finally:
      self._close_board()


class Progress:
  """A bar with rate and time left on a terminal; a plain line now and then otherwise."""

  def __init__(self, name: str, *, total: int, done: int):
    """`done` of `total` steps are behind us."""
    self._name, self._total, self._done, self._first = name, total, done, done
    self._start = time.monotonic()
    self._bar: Any = None
    if is_heard() and sys.stdout.isatty() and processes.is_first():
      # With the usual fallback where the terminal gives no size; tqdm alone would show nothing there.
      size = shutil.get_terminal_size()
      self._bar = tqdm.tqdm(
        total=total, initial=done, desc=name, unit="step", file=sys.stdout, ncols=size.columns, nrows=size.lines
      )

  def advance(self, steps: int) -> None:
    """So many steps more are done."""
    self._done += steps
    if self._bar is not None:
      self._bar.update(steps)

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
