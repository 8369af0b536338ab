"""Recommends from a finished run: `python -m bbqrec_jax.recommend --workdir=DIR --history=3,17,256`."""

import functools
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import app, flags, logging

from bbqrec_jax.config import default_config, flatten
from bbqrec_jax.data.interactions import from_lengths
from bbqrec_jax.data.pipeline import evaluation_batches
from bbqrec_jax.errors import InputError, refuse
from bbqrec_jax.experiment import read_data
from bbqrec_jax.json_files import read_json
from bbqrec_jax.models.apply import apply
from bbqrec_jax.models.catalogue import Catalogue
from bbqrec_jax.models.recommender import Recommender
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.train.checkpointing import Checkpointer
from bbqrec_jax.train.recommender_stage import (
  build_recommender,
  check_fingerprint,
  initial_state,
  needs_semantic_ids,
  tokenizer_folder,
)


def load_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """The config that a run wrote into its workdir.

  Raises:
    InputError: if there is no run, or it is of another version of the fields.
  """
  path = workdir / "config.json"
  if not path.exists():
    raise InputError(f"{path} does not exist: --workdir must be that of a run of bbqrec_jax.main")
  config = default_config()
  written = flatten(read_json(path))
  unknown = written.keys() ^ flatten(config).keys()
  if unknown:
    raise InputError(f"{path} does not fit this version: field {sorted(unknown)[0]} is on one side only")
  config.update_from_flattened_dict(written)
  return config


def parse_history(text: str, *, num_items: int) -> np.ndarray:
  """Item numbers [n] int32 from "3,17,256".

  Raises:
    InputError: if an entry is not the number of an item.
  """
  items = []
  for place, entry in enumerate(text.split(",")):
    if not entry.strip().isdecimal() or int(entry) >= num_items:
      raise InputError(
        f"--history entry {place + 1}: expected an item number from 0 to {num_items - 1}, got {entry.strip()!r}"
      )
    items.append(int(entry))
  return np.array(items, np.int32)


def recommend(
  model: Recommender,
  params: Any,
  catalogue: Catalogue,
  history: np.ndarray,
  *,
  top: int,
  beam_width: int,
  repeat: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """The best next items of one history.

  Args:
    model: the recommender.
    params: its parameters.
    catalogue: the items.
    history: [n] int, in time order; the last `max_length` count.
    top: how many items; fewer come back if the catalogue has fewer.
    beam_width: of a head that searches; at least `top` beams are kept.
    repeat: whether items of the history may come back.

  Returns:
    (items [top], scores [top]), best first; the score is the item's log-probability: of its semantic ID (generative),
    among all items (dense, parallel), or among the candidates (hybrid).
  """
  exclude = np.zeros(0, np.int64) if repeat else np.unique(history)
  histories = from_lengths(history, np.array([len(history)]), np.array(["history"]))
  batch = next(evaluation_batches(histories, np.zeros(1, np.int32), batch_size=1, max_length=model.settings.max_length))
  call = jax.jit(functools.partial(apply, model), static_argnums=1, static_argnames="width")
  states = call(params, "last_states", catalogue, batch)
  width = min(max(beam_width, top), model.settings.num_items)
  found = call(params, "search", catalogue, states, width=width, exclude=exclude[None])
  items, scores = np.asarray(found.items[0, :top]), np.asarray(found.log_probs[0, :top])
  return items[items >= 0], scores[items >= 0]


def restore(workdir: pathlib.Path):
  """(dataset, ids, model, params, catalogue, config) of the best model in a finished workdir.

  Raises:
    InputError: if the run is not finished, or the data is not what it was trained on.
  """
  config = load_config(workdir)
  if not (workdir / "results.json").exists():
    raise InputError(f"{workdir} holds no finished run (no results.json): start bbqrec_jax.main on it again")
  dataset, split, figures = read_data(config)
  trained_on = read_json(workdir / "run.json")
  for name in ("split_hash", "features_hash"):
    if trained_on[f"data {name}"] != figures[name]:
      raise InputError(
        f"{dataset.source} has {name} {figures[name]}, the run in {workdir} was trained on"
        f" {trained_on[f'data {name}']}: give it its own data"
      )
  ids = None
  if needs_semantic_ids(config):
    ids = SemanticIds.load(tokenizer_folder(config, workdir))
    check_fingerprint(workdir, ids)
  model, catalogue = build_recommender(config, ids, split.train, num_items=dataset.num_items)
  best = read_json(workdir / "results.json")["best_step"]
  checkpointer = Checkpointer(workdir / "checkpoints" / "recommender")
  state = checkpointer.restore_state(best, initial_state(config, model, catalogue))
  checkpointer.close()
  return dataset, ids, model, state.params, catalogue, config


def main(argv: list[str]) -> None:
  """Prints the history and the recommended items with titles, semantic IDs and scores."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  options = flags.FLAGS
  try:
    if options.top < 1:
      raise InputError(f"--top must be at least 1, got {options.top}")
    dataset, ids, model, params, catalogue, config = restore(pathlib.Path(options.workdir))
    history = parse_history(options.history, num_items=dataset.num_items)
    items, scores = recommend(
      model,
      params,
      catalogue,
      history,
      top=options.top,
      beam_width=config.evaluation.beam_width,
      repeat=options.repeat,
    )
  except InputError as error:
    refuse(error)

  def line(item):
    code = "" if ids is None else " ".join(f"{value:3d}" for value in ids.codes[item]) + "  "
    return f"{item:6d}  {code}{dataset.titles[item]}"

  print("history:", *(" " * 16 + line(item) for item in history), sep="\n")
  rows = enumerate(zip(items, scores, strict=True), 1)
  print("recommended:", *(f"{rank:4d}  {score:8.3f}  {line(item)}" for rank, (item, score) in rows), sep="\n")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "The workdir of a finished run.")
  flags.DEFINE_string("history", None, "Item numbers in time order, separated by commas.")
  flags.DEFINE_integer("top", 10, "How many items to recommend.")
  flags.DEFINE_bool("repeat", False, "Whether items of the history may be recommended again.")
  flags.mark_flags_as_required(["workdir", "history"])
  app.run(main)
