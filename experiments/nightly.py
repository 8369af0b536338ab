"""Tomorrow's run begun from yesterday's, beside one that is trained anew: how long, and how good.

    python experiments/nightly.py --config_file=dense --path=DIR --workdir=runs/nightly

Cuts the histories of a data set in two: yesterday lacks the last interaction of every user (of those who keep three),
and all interactions of some users (`--new_users`) and with some items (`--new_items`). Both are prepared as
anyone's log is, with their own numbers for users and items. Then `bbqrec train` runs on yesterday, on today, and on
today with `--init_from`, each in a process of its own. What is done already is not done again. Prints a line a run and
writes them to `nightly.json`: minutes, those of the CPU, steps, and the metrics of the same test, that of today.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from absl import flags

from bbqrec_jax.command_line import define_path, start
from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.directory import load_directory
from bbqrec_jax.data.encoding.encode import features
from bbqrec_jax.data.interactions import MINIMUM_LENGTH
from bbqrec_jax.data.preparation.prepare import prepare
from bbqrec_jax.utils.json_files import read_json, write_json


def in_yesterday(
  offsets: np.ndarray, items: np.ndarray, *, new_users: float, new_items: float, seed: int
) -> np.ndarray:
  """Which interactions there were yesterday already, [n] bool.

  Args:
    offsets: [U + 1] int, where each user's history begins.
    items: [n] int, of the interactions.
    new_users: the share of users that come today.
    new_items: likewise of items.
    seed: draws them.
  """
  rng = np.random.default_rng(seed)
  lengths = np.diff(offsets)
  kept = np.where(lengths > MINIMUM_LENGTH, lengths - 1, lengths)
  kept[rng.random(len(lengths)) < new_users] = 0
  known = rng.random(items.max() + 1) >= new_items
  place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
  return (place < np.repeat(kept, lengths)) & known[items]


def write_data(dataset: Dataset, chosen: np.ndarray, folder: pathlib.Path) -> None:
  """Prepares some of a data set's interactions, and joins the features of its items."""
  interactions = dataset.interactions
  users = np.repeat(np.arange(interactions.num_users), np.diff(interactions.offsets))[chosen]
  ids = [str(one) for one in dataset.item_ids.to_json()]
  log = {"user": [f"U{user}" for user in users], "item": [ids[item] for item in interactions.items[chosen]]}
  prepare(log, folder, time="none", duplicates="keep", min_per_user=MINIMUM_LENGTH)
  held = {name: np.flatnonzero(mask) for name, mask in dataset.present.items()}
  joined = {
    name: ([ids[row] for row in held[name]], np.asarray(array)[held[name]]) for name, array in dataset.features.items()
  }
  features(folder, join=joined, text="none", image="none", attributes="none")


def train(workdir: pathlib.Path, data: pathlib.Path, *given: str) -> dict[str, Any]:
  """A run by the command line; kept in `took.json` beside its results."""
  if not (workdir / "took.json").exists():
    command = [sys.executable, "-m", "bbqrec_jax", "train", f"--data={data}", f"--workdir={workdir}", *given]
    started = time.monotonic()
    with (
      open(workdir.with_suffix(".log"), "w", encoding="utf-8") as log,
      tempfile.TemporaryDirectory() as cache,  # Every run compiles: another number of items is another program.
    ):
      environment = os.environ | {"XDG_CACHE_HOME": cache}
      process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
      _, status, used = os.wait4(process.pid, 0)
    if status:
      sys.exit(f"{' '.join(command)}: failed, see {workdir.with_suffix('.log')}")
    minutes = {"minutes": time.monotonic() - started, "cpu_minutes": used.ru_utime + used.ru_stime}
    write_json(workdir / "took.json", {name: round(value / 60, 2) for name, value in minutes.items()})
  results, took = read_json(workdir / "results.json"), read_json(workdir / "took.json")
  figures = {name: round(results["test"][name], 4) for name in ("recall@10", "ndcg@10")}
  took.pop("checksum", None)
  return {"run": workdir.name, **took, "steps": results["steps"], "best_step": results["best_step"], **figures}


def main(argv: list[str]) -> None:
  """Runs what is not done, and prints."""
  del argv
  options = flags.FLAGS
  root = options.workdir
  root.mkdir(parents=True, exist_ok=True)
  dataset = load_directory(options.path)
  chosen = in_yesterday(
    dataset.interactions.offsets,
    dataset.interactions.items,
    new_users=options.new_users,
    new_items=options.new_items,
    seed=options.seed,
  )
  for name, kept in (("yesterday", chosen), ("today", np.ones_like(chosen))):
    if not (root / "data" / name).exists():
      write_data(dataset, kept, root / "data" / name)
  config = [f"--config={options.config_file}", *(f"--config.{one}" for one in options.set)]
  rows = []
  for name, data, more in (
    ("yesterday", "yesterday", []),
    ("anew", "today", []),
    ("from_yesterday", "today", [f"--init_from={root / 'yesterday'}"]),
  ):
    rows.append(train(root / name, root / "data" / data, *config, *more))
    print(json.dumps(rows[-1]), flush=True)
  (root / "nightly.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  flags.DEFINE_string("config_file", None, "A preset or a config file, as bbqrec train --config takes.")
  flags.DEFINE_multi_string("set", [], "FIELD=VALUE: sets a field of the config, of all runs.")
  define_path("path", "The folder of the data, in the project's own format.")
  define_path("workdir", "Where everything is written.")
  flags.DEFINE_float("new_users", 0.05, "Share of the users that come today.", lower_bound=0, upper_bound=0.9)
  flags.DEFINE_float("new_items", 0.02, "Share of the items that come today.", lower_bound=0, upper_bound=0.9)
  flags.DEFINE_integer("seed", 0, "Draws the users and items that come today.", lower_bound=0)
  flags.mark_flags_as_required(["config_file", "path", "workdir"])
  start(main)
