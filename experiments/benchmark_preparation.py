"""How fast, and in how much memory, a log becomes a data set and its items' features.

    python experiments/benchmark_preparation.py --interactions=10000000 --items=1000000 --users=1000000

Writes an invented log (CSV, string ids, milliseconds) and item table, then prepares them and makes the features of
their texts and attributes, each in a process of its own, and prints seconds, those of the CPU, rows a second of these,
and the peak of the resident memory.
"""

import json
import multiprocessing
import os
import pathlib
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags

from bbqrec_jax.command_line import define_path, start

WORDS = ("red", "blue", "large", "small", "oak", "steel", "lamp", "mug", "chair", "table", "plate", "rug", "for", "the")


def write_log(path: pathlib.Path, *, interactions: int, users: int, items: int, seed: int = 0) -> None:
  """A CSV of clicks in time order: item n with a probability that falls as 1 / (n + 10), users evenly."""
  rng = np.random.default_rng(seed)
  weights = np.cumsum(1 / (np.arange(items) + 10.0))
  with path.open("w") as file:
    file.write("customer_id,sku,ts\n")
    for first in range(0, interactions, 2**20):
      count = min(2**20, interactions - first)
      user = rng.integers(users, size=count).tolist()
      item = np.searchsorted(weights, rng.random(count) * weights[-1]).tolist()
      second = (1_700_000_000_000 + 1000 * np.arange(first, first + count)).tolist()
      file.writelines(f"customer-{u:08d},SKU-{i:08d},{t}\n" for u, i, t in zip(user, item, second, strict=True))


def write_items(path: pathlib.Path, *, items: int, seed: int = 1) -> None:
  """A CSV of products with titles, brands, categories and prices."""
  rng = np.random.default_rng(seed)
  with path.open("w") as file:
    file.write("sku,title,brand,category,price\n")
    for first in range(0, items, 2**18):
      count = min(2**18, items - first)
      words = rng.integers(len(WORDS), size=(count, 5)).tolist()
      brand, kind = rng.integers(1000, size=count).tolist(), rng.integers(200, size=count).tolist()
      file.writelines(
        f"SKU-{first + row:08d},{' '.join(WORDS[word] for word in words[row])},Brand {brand[row]},"
        f"Home > Kind {kind[row]},{5 + row % 90}.99\n"
        for row in range(count)
      )


def measured(function: Callable[[], Any]) -> dict[str, float]:
  """Seconds, seconds of the CPU, and GiB of resident memory at the most, of a function in a process of its own."""
  receive, send = multiprocessing.Pipe(duplex=False)
  started = time.monotonic()
  if not os.fork():
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
      function()
    except BaseException:
      os._exit(1)
    used = resource.getrusage(resource.RUSAGE_SELF)
    send.send({"cpu_seconds": used.ru_utime + used.ru_stime, "peak_gib": used.ru_maxrss / 2**20})
    os._exit(0)
  send.close()
  figures = receive.recv()
  return {"seconds": round(time.monotonic() - started, 1)} | {name: round(value, 2) for name, value in figures.items()}


def main(argv: list[str]) -> None:
  """Measures and prints."""
  del argv
  from bbqrec_jax.data.encoding.encode import features
  from bbqrec_jax.data.preparation.prepare import prepare

  options = flags.FLAGS
  with tempfile.TemporaryDirectory(dir=options.folder) as name:
    folder = pathlib.Path(name)
    write_log(folder / "log.csv", interactions=options.interactions, users=options.users, items=options["items"].value)
    write_items(folder / "items.csv", items=options["items"].value)
    given = {"items": folder / "items.csv", "unseen_items": True}
    result: dict[str, Any] = {
      "interactions": options.interactions,
      "items": options["items"].value,
      "users": options.users,
      "log_mib": round((folder / "log.csv").stat().st_size / 2**20),
    }
    print(json.dumps(result), flush=True)
    for stage, count, function in (
      ("prepare", options.interactions, lambda: prepare(folder / "log.csv", folder / "out", **given)),
      ("features", options["items"].value, lambda: features(folder / "out")),
    ):
      figures = measured(function)
      figures["rows_a_cpu_second"] = round(count / figures["cpu_seconds"])
      print(json.dumps({stage: figures}), flush=True)


if __name__ == "__main__":
  flags.DEFINE_integer("interactions", 10**6, "Rows of the log.", lower_bound=100)
  flags.DEFINE_integer("users", 10**5, "Users.", lower_bound=1)
  flags.DEFINE_integer("items", 10**5, "Items.", lower_bound=10)
  define_path("folder", "Where the files are made; a temporary folder by default.")
  start(main)
