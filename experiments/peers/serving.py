"""What both sides of a comparison share: the shapes, and a process that works when it is told to."""

import pathlib
import resource
import sys
import time
from collections.abc import Callable

# Quantizer: an autoencoder around four levels of 256 codes.
WIDTHS, LEVELS, CODES, ITEM_BATCH = (768, 512, 256, 128, 32), 4, 256, 1024
STEPS, BLOCKS = 20, 40

# T5 in TIGER's shape: 4 + 4 layers, d 128, 6 heads of 64, ff 1024, histories of 20 items of four codes each.
T5 = {"layers": 4, "width": 128, "heads": 6, "head_width": 64, "mlp_width": 1024, "dropout": 0.1}
ITEMS, HISTORY, TRAIN_BATCH, SEARCH_BATCH, BEAM = 12_101, 20, 64, 16, 20
USERS = 256  # Of real histories.

# SASRec with full cross-entropy at every position.
SASREC = {"batch": 256, "length": 50, "width": 64, "layers": 2, "heads": 2, "mlp_width": 256, "dropout": 0.5}


def semantic_ids(seed: int = 0):
  """Distinct random IDs [ITEMS, LEVELS]."""
  import numpy as np

  chosen = np.random.default_rng(seed).choice(CODES**LEVELS, size=ITEMS, replace=False)
  return np.stack(np.unravel_index(chosen, (CODES,) * LEVELS), axis=1)


def real_histories(file: str) -> list[list[int]]:
  """The last HISTORY items before the last one of USERS users, taken from all over a `sequences.txt`.

  Raises:
    ValueError: if it has fewer users, or items beyond ITEMS.
  """
  lines = pathlib.Path(file).read_text(encoding="utf-8").splitlines()
  if len(lines) < USERS:
    raise ValueError(f"expected at least {USERS} users, got {len(lines)}")
  chosen = lines[:: len(lines) // USERS][:USERS]
  histories = [[int(item) for item in line.split()[1:-1]][-HISTORY:] for line in chosen]
  largest = max(map(max, histories))
  if largest >= ITEMS:
    raise ValueError(f"expected at most {ITEMS} items, got number {largest}")
  return histories


def serve(tasks: dict[str, Callable[[], object]]) -> None:
  """Answers the names of tasks on standard input with the seconds they took; "resident" and "peak" with bytes.

  A task may return a number, which follows the seconds: the share of valid items, say.
  """
  for line in sys.stdin:
    command, start = line.strip(), time.perf_counter()
    if command == "peak":
      print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)
    elif command == "resident":
      pages = int(pathlib.Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
      print(pages * resource.getpagesize(), flush=True)
    else:
      extra = tasks[command]()
      print(time.perf_counter() - start, *([] if extra is None else [extra]), flush=True)
