"""Recommends from a finished run: `python -m bbqrec_jax.recommend --workdir=DIR --history=3,17,256`."""

import functools
import json
import pathlib
import sys
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import app, flags, logging

from bbqrec_jax.config import default_config, flatten
from bbqrec_jax.data.interactions import from_lengths
from bbqrec_jax.data.pipeline import evaluation_batches
from bbqrec_jax.errors import InputError
from bbqrec_jax.experiment import read_data
from bbqrec_jax.models.apply import apply
from bbqrec_jax.models.recommender import Catalogue, Recommender
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.semantic_ids.trie import Trie
from bbqrec_jax.train.checkpointing import Checkpointer
from bbqrec_jax.train.recommender_stage import build_recommender, initial_state, needs_semantic_ids

_WORKDIR = flags.DEFINE_string("workdir", None, "The workdir of a finished run.", required=True)
_HISTORY = flags.DEFINE_string("history", None, "Item numbers in time order, by commas.", required=True)
_TOP = flags.DEFINE_integer("top", 10, "How many items to recommend.")
_REPEAT = flags.DEFINE_bool("repeat", False, "Whether items of the history may be recommended again.")


def load_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """The config that a run wrote into its workdir.

  Raises:
    InputError: if there is no run, or it is of another version of the fields.
  """
  path = workdir / "config.json"
  if not path.exists():
    raise InputError(f"{path} does not exist: --workdir must be that of a run of bbqrec_jax.main")
  config = default_config()
  written = flatten(json.loads(path.read_text(encoding="utf-8")))
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
  trie: Trie | None,
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
    trie: their IDs, for the generative head.
    history: [n] int, in time order; the last `max_length` count.
    top: how many items; fewer come back if the catalogue has fewer.
    beam_width: of the generative head; at least `top` beams are kept.
    repeat: whether items of the history may come back.

  Returns:
    (items [top], scores [top]), best first; the score is the log-probability of the item's semantic ID (generative) or
    its log-probability among all items (dense).
  """
  exclude = np.zeros(0, np.int64) if repeat else np.unique(history)
  histories = from_lengths(history, np.array([len(history)]), np.array(["history"]))
  batch = next(evaluation_batches(histories, np.zeros(1, np.int32), batch_size=1, max_length=model.settings.max_length))
  states = apply(model, params, "last_states", catalogue, batch)
  if model.settings.head == "dense":
    log_probs = np.array(jax.nn.log_softmax(apply(model, params, "dense_scores", catalogue, states))[0])
    log_probs[exclude] = -np.inf
    items = np.argsort(-log_probs, kind="stable")[:top]
    scores = log_probs[items]
  else:
    search = functools.partial(apply, model, width=max(beam_width, top), exclude=exclude[None])
    beam = jax.jit(search, static_argnums=1)(params, "generate", catalogue, trie, states)
    items, scores = np.asarray(beam.items[0, :top]), np.asarray(beam.log_probs[0, :top])
  real = np.isfinite(scores)
  return items[real], scores[real]


def restore(workdir: pathlib.Path):
  """(dataset, ids, model, params, catalogue, trie, config) of the best model in a finished workdir.

  Raises:
    InputError: if the run is not finished, or the data is not what it was trained on.
  """
  config = load_config(workdir)
  if not (workdir / "results.json").exists():
    raise InputError(f"{workdir} holds no finished run (no results.json): start bbqrec_jax.main on it again")
  dataset, split, figures = read_data(config)
  trained_on = json.loads((workdir / "run.json").read_text(encoding="utf-8"))
  for name in ("split_hash", "features_hash"):
    if trained_on[f"data {name}"] != figures[name]:
      raise InputError(
        f"{dataset.source} has {name} {figures[name]}, the run in {workdir} was trained on"
        f" {trained_on[f'data {name}']}: give it its own data"
      )
  ids = SemanticIds.load(workdir / "tokenizer") if needs_semantic_ids(config) else None
  model, catalogue, trie = build_recommender(config, ids, split.train, num_items=dataset.num_items)
  best = json.loads((workdir / "results.json").read_text(encoding="utf-8"))["best_step"]
  checkpointer = Checkpointer(workdir / "checkpoints" / "recommender", metric="ndcg@10")
  state = checkpointer.restore_state(best, initial_state(config, model, catalogue))
  checkpointer.close()
  return dataset, ids, model, state.params, catalogue, trie, config


def main(argv: list[str]) -> None:
  """Prints the history and the recommended items with titles, semantic IDs and scores."""
  del argv
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  try:
    if _TOP.value < 1:
      raise InputError(f"--top must be at least 1, got {_TOP.value}")
    dataset, ids, model, params, catalogue, trie, config = restore(pathlib.Path(_WORKDIR.value))
    history = parse_history(_HISTORY.value, num_items=dataset.num_items)
    items, scores = recommend(
      model,
      params,
      catalogue,
      trie,
      history,
      top=_TOP.value,
      beam_width=config.evaluation.beam_width,
      repeat=_REPEAT.value,
    )
  except InputError as error:
    sys.exit(f"error: {error}")

  def line(item):
    code = "" if ids is None else " ".join(f"{value:3d}" for value in ids.codes[item]) + "  "
    return f"{item:6d}  {code}{dataset.titles[item]}"

  print("history:\n" + "\n".join("                " + line(item) for item in history))
  print("recommended:\n" + "\n".join(
    f"{rank:4d}  {score:8.3f}  {line(item)}" for rank, (item, score) in enumerate(zip(items, scores, strict=True), 1)
  ))  # fmt: skip


if __name__ == "__main__":
  app.run(main)
