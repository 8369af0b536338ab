"""Items that nobody had bought when the model was trained: does it recommend them?

    python experiments/cold_items.py --config=configs/scientific.py --config.data.path=DIR --workdir=runs/cold

holds a share of the items out of everything (`--share`, drawn by `--config.seed`): they are in no history and no
tokenizer's catalogue. It writes what is left as a data set of its own, runs the config on it, gives the held-out items
their IDs with the frozen tokenizer, and asks for the next item of every user whose last item is one of them, among all
items. Nothing is trained for them. What is done already is not done again, and other heads (`scientific.py:dense`, the
same workdir) share the IDs, as do other recommenders of one head under another `--name`. Prints a line and writes it to
`NAME.json`.
"""

import json
import pathlib
from typing import Any

import numpy as np
from absl import flags
from ml_collections import config_flags

from bbqrec_jax.command_line import define_path, ready_to_train, start, training
from bbqrec_jax.config import read_config
from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.directory import read_new_items
from bbqrec_jax.data.features import feature_widths, load_new_items
from bbqrec_jax.data.interactions import MINIMUM_LENGTH, Interactions, choose, drop_short_users
from bbqrec_jax.data.sources import load
from bbqrec_jax.errors import InputError
from bbqrec_jax.recommender.evaluate import evaluate, make_ranker
from bbqrec_jax.recommender.settings import needs_semantic_ids
from bbqrec_jax.runs.restore import restore
from bbqrec_jax.runs.run import of_any_recommender, run, tokenize
from bbqrec_jax.runs.workdir import with_absolute_paths
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.tokenizer.new_items import assign
from bbqrec_jax.training.partitioning import make_partitioner
from bbqrec_jax.utils.files import check_place
from bbqrec_jax.utils.json_files import read_json, write_json


def choose_cold(num_items: int, share: float, *, seed: int) -> np.ndarray:
  """Which items are held out, [N] bool: the nearest whole number to a share, at least one."""
  count = max(1, round(share * num_items))
  cold = np.zeros(num_items, bool)
  cold[np.random.default_rng(seed).choice(num_items, count, replace=False)] = True
  return cold


def part(interactions: Interactions, cold: np.ndarray) -> tuple[Interactions, Interactions, np.ndarray]:
  """Histories without the cold items, and those that end with one.

  Args:
    interactions: all.
    cold: [N] bool.

  Returns:
    The histories of warm items, renumbered, of users that have enough of them; the histories of the users whose last
    item is cold, without it and without other cold ones, renumbered, where any item is left; and those users' last
    items, numbered among the cold ones.
  """
  number = np.where(cold, np.cumsum(cold), np.cumsum(~cold)) - 1
  owner = np.repeat(np.arange(interactions.num_users), interactions.lengths)
  warm = ~cold[interactions.items]
  lengths = np.bincount(owner[warm], minlength=interactions.num_users)
  last = interactions.items[interactions.offsets[1:] - 1]
  asked = cold[last] & (lengths > 0)
  left = choose(interactions, warm, lengths, interactions.users)
  left = Interactions(number[left.items].astype(np.int32), left.offsets, left.users, left.times)
  histories = choose(left, np.repeat(asked, lengths), lengths[asked], left.users[asked])
  return drop_short_users(left, MINIMUM_LENGTH), histories, number[last[asked]].astype(np.int32)


def save(dataset: Dataset, keep: np.ndarray, folder: pathlib.Path, interactions: Interactions | None = None) -> None:
  """Writes the chosen items of a data set, and histories of them, in the format of `--config.data.source=directory`.

  Their rows are others there, their ids the same.
  """
  folder.mkdir(parents=True, exist_ok=True)
  for name, array in dataset.features.items():
    np.save(folder / f"{name}_features.npy", array[keep])
    np.save(folder / f"has_{name}.npy", dataset.present[name][keep])
  records = ({"id": str(dataset.item_ids[item]), "title": dataset.titles[item]} for item in np.flatnonzero(keep))
  (folder / "items.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
  if interactions is None:
    return
  for name, values in (("sequences", interactions.items), ("timestamps", interactions.times)):
    if values is not None:
      parts = np.split(values, interactions.offsets[1:-1])
      lines = (" ".join([str(user), *map(str, part)]) for user, part in zip(interactions.users, parts, strict=True))
      (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


def main(argv: list[str]) -> None:
  """Trains what is not there yet, and prints what it makes of cold items."""
  del argv
  ready_to_train()
  workdir = flags.FLAGS.workdir
  with training(workdir):
    print(report(with_absolute_paths(flags.FLAGS.config), workdir, share=flags.FLAGS.share, name=flags.FLAGS.name))


def report(config: Any, workdir: pathlib.Path, *, share: float, name: str | None = None) -> str:
  """Does the work; the table. A run without a name has its head's."""
  if not 0 < share < 1:
    raise InputError(f"--share: expected a number between 0 and 1, got {share}")
  if (name is not None and not name.isidentifier()) or name in ("data", "new_items", "ids", "held_out"):
    raise InputError(
      f"--name: expected letters, digits and _, and no name that the workdir has for something else, got {name!r}"
    )
  read_config(config)
  dataset = load(config.data)
  cold = choose_cold(dataset.num_items, share, seed=config.seed)
  warm, histories, targets = part(dataset.interactions, cold)
  if not len(targets):
    raise InputError(f"no user's last item is among the {cold.sum()} held out: raise --share")
  data, new, note = workdir / "data", workdir / "new_items", workdir / "held_out.json"
  held_out = {"data": dataset.name, "items": dataset.item_ids.keep(cold).to_json()}
  if not note.exists():
    save(dataset, cold, new)
    save(dataset, ~cold, data, warm)
    write_json(note, held_out)
  elif read_json(note) != held_out:
    raise InputError(
      f"{workdir} holds out other items: use another --workdir, or the --share and seed it was made with"
    )
  config.data.source, config.data.path = "directory", str(data)
  config.data.modalities = dataset.modalities
  folder = workdir / "ids"
  tokenize(of_any_recommender(config), folder)
  config.tokenizer.artefact = str(folder / "tokenizer")
  extended = folder / "extended"
  if not SemanticIds.exists(extended):
    ids = SemanticIds.load(folder / "tokenizer")
    item_ids, _ = read_new_items(new, ids.item_ids, count=int(cold.sum()))
    assign(ids, *load_new_items(new, feature_widths(dataset.features)), item_ids=item_ids).save(extended)
  name = config.recommender.head if name is None else name
  folder = workdir / name
  results = run(config, folder)
  restored = restore(
    folder,
    tokenizer=extended if needs_semantic_ids(config) else None,
    features=new,
    trusted=[own.partition(":")[0] for own in (config.recommender.head, config.recommender.backbone)],
  )
  partitioner = make_partitioner(config)
  metrics = evaluate(
    partitioner.compile_map(make_ranker(restored.model, beam_width=config.evaluation.beam_width)),
    partitioner.place(restored.params),
    partitioner.place(restored.catalogue),
    histories,
    targets + int(np.sum(~cold)),
    batch_size=config.evaluation.batch_size,
    max_length=config.recommender.max_length,
    num_items=dataset.num_items,
  ).metrics
  figures = {
    "items": dataset.num_items, "cold_items": int(cold.sum()), "cold_users": len(targets), "cold": metrics,
    "warm": results["test"],
  }  # fmt: skip
  write_json(workdir / f"{name}.json", figures)
  lines = [
    f"{dataset.name}: {dataset.num_items:,} items, {cold.sum():,} of them in no history that was trained on;"
    f" {len(targets):,} users whose last item is one of these, {results['data']['users']:,} others' test items",
    "| name | cold Recall@10 | NDCG@10 | warm Recall@10 | NDCG@10 |",
    "|---|---|---|---|---|",
    f"| {name} | "
    + " | ".join(f"{part[metric]:.4f}" for part in (metrics, results["test"]) for metric in ("recall@10", "ndcg@10"))
    + " |",
  ]
  return "\n".join(lines)


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "The config to run on what is left.")
  define_path("workdir", "Gets the two data sets, the run and the IDs.", check=check_place)
  flags.DEFINE_string("name", None, "Of this recommender's folder and figures; its head, if not given.")
  flags.DEFINE_float("share", 0.05, "Of the items, to hold out.")
  flags.mark_flags_as_required(["config", "workdir"])
  start(main)
