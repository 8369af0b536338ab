"""What every side of `time_to_quality.py` shares: a clock that can be stopped, and the file of its curve.

It runs in the peers' environment as well as in this project's: nothing but the standard library is imported.
"""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any


def process_seconds() -> float:
  """Wall seconds since this process was started, interpreter and imports included; Linux only."""
  fields = pathlib.Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
  return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def core_seconds() -> float:
  """Processor seconds of this process and of its children that have ended, the kernel's part included."""
  return sum(os.times()[:4])


def memory_mib() -> tuple[int, int]:
  """Resident memory of this process in MiB, libraries and all: now, and at its peak; Linux only."""
  status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
  found = dict(line.split(":", 1) for line in status.splitlines())
  return tuple(int(found[name].split()[0]) // 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


class Curve:
  """Appends a JSON line for each validation, with what the process has spent until then, less what is left out."""

  def __init__(self, path: str | pathlib.Path):
    """Nothing is left out yet; the file at `path` is begun anew."""
    self._path, self._left_out = pathlib.Path(path), (0.0, 0.0)
    self._path.write_text("", encoding="utf-8")

  def _spent(self) -> tuple[float, float]:
    return process_seconds() - self._left_out[0], core_seconds() - self._left_out[1]

  @contextlib.contextmanager
  def stopped(self) -> Iterator[None]:
    """While this lasts, neither clock runs: for what the system itself would not do."""
    before = self._spent()
    try:
      yield
    finally:
      after = self._spent()
      self._left_out = tuple(out + b - a for out, a, b in zip(self._left_out, before, after, strict=True))  # type: ignore[assignment]

  def _write(self, record: Mapping[str, Any]) -> None:
    with self._path.open("a", encoding="utf-8") as file:
      file.write(json.dumps(record) + "\n")

  def about(self, **values: Any) -> None:
    """Notes what the system is: its versions, its settings."""
    self._write({"about": values})

  def row(self, step: int, *, ndcg: float, recall: float, users: int, **more: float) -> None:
    """A validation is done.

    Args:
      step: steps or epochs so far, as the system counts.
      ndcg: NDCG@10.
      recall: Recall@10.
      users: that were ranked for these.
      more: what else is to be kept.
    """
    (wall, core), (resident, peak) = self._spent(), memory_mib()
    self._write({
      "seconds": round(wall, 2), "core_seconds": round(core, 2), "resident_mib": resident, "peak_mib": peak,
      "step": step, "ndcg@10": round(ndcg, 5), "recall@10": round(recall, 5), "users": users, **more,
    })  # fmt: skip
