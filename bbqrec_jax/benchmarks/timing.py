"""Times work in windows, after it is compiled."""

import dataclasses
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
  """Something to time.

  Attributes:
    name: "part/what".
    work: what one call does, in `unit`s.
    unit: "items", "users", "batches" or "steps".
    make: -> a function of no argument that does it once and returns arrays to wait for.
    cost: -> the FLOPs in the matrix products of one call and its compulsory bytes; None where it is no program of the
      device.
    dtype: that the products are computed in.
  """

  name: str
  work: float
  unit: str
  make: Callable[[], Callable[[], Any]]
  cost: Callable[[], tuple[float, float]] | None = None
  dtype: str = "float32"


def _seconds(call: Callable[[], Any], times: int = 1) -> float:
  """Of some calls, waited for at their end alone."""
  start = time.perf_counter()
  results = [call() for _ in range(times)]
  jax.block_until_ready(results[-1])
  return time.perf_counter() - start


def measure(case: Case, *, windows: int, window_seconds: float) -> dict[str, Any]:
  """One record.

  Args:
    case: what to time.
    windows: how many windows are timed.
    window_seconds: about how long each is; a window holds whole calls, and waits for the device at its end.

  Returns:
    `name`, `unit`, `work` of a call; `median_s`, `p90_s` of a call over the windows and `rate` in units a second;
    `first_call_s`, with its compilation; `flops`, `bytes`;
    `device_peak_bytes` (None where the device does not say) and `process_peak_bytes` since the process began.
  """
  call = case.make()
  first = _seconds(call)
  once = _seconds(call)
  calls = max(1, round(window_seconds / max(once, 1e-6)))
  taken = [_seconds(call, calls) / calls for _ in range(windows)]
  median = statistics.median(taken)
  flops, moved = case.cost() if case.cost else (None, None)
  memory = jax.local_devices()[0].memory_stats() or {}
  return {
    "name": case.name, "unit": case.unit, "work": case.work, "median_s": median,
    "p90_s": float(np.quantile(taken, 0.9)), "windows": windows, "calls": calls, "rate": case.work / median,
    "first_call_s": first, "flops": flops, "bytes": moved,
    "dtype": case.dtype, "device_peak_bytes": memory.get("peak_bytes_in_use"),
    "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
  }  # fmt: skip
