"""Recommends from a finished run: `python -m bbqrec_jax.recommend --workdir=DIR --history=3,17,256`."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from bbqrec_jax.compilation import keep_compiled
from bbqrec_jax.data.interactions import from_lengths
from bbqrec_jax.data.pipeline import evaluation_batches
from bbqrec_jax.errors import InputError, printable, refuse
from bbqrec_jax.experiment import restore
from bbqrec_jax.models.apply import apply
from bbqrec_jax.models.catalogue import Catalogue
from bbqrec_jax.models.recommender import Recommender


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


def parse_times(text: str | None, *, count: int) -> np.ndarray | None:
  """Seconds [n] float64 from "874965478,874965518"; None for None.

  Raises:
    InputError: if they are not `count` finite numbers in time order.
  """
  if text is None:
    return None
  try:
    times = np.array(text.split(","), np.float64)
  except ValueError:
    times = np.array([np.nan])
  if len(times) != count or not np.isfinite(times).all() or np.any(np.diff(times) < 0):
    raise InputError(f"--times: expected {count} numbers in time order, one for each item of --history, got {text!r}")
  return times


def recommend(
  model: Recommender,
  params: Any,
  catalogue: Catalogue,
  history: np.ndarray,
  *,
  top: int,
  beam_width: int,
  repeat: bool = False,
  times: np.ndarray | None = None,
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
    times: [n] the second of each interaction, for a model with time buckets.

  Returns:
    (items [top], scores [top]), best first; the score is the item's log-probability: of its semantic ID (generative),
    among all items (dense, parallel), or among the candidates (hybrid).
  """
  exclude = np.zeros(0, np.int64) if repeat else np.unique(history)
  histories = from_lengths(history, np.array([len(history)]), np.array(["history"]), times)
  batch = next(evaluation_batches(histories, np.zeros(1, np.int32), batch_size=1, max_length=model.settings.max_length))
  call = jax.jit(functools.partial(apply, model), static_argnums=1, static_argnames="width")
  states = call(params, "last_states", catalogue, batch)
  width = min(max(beam_width, top), catalogue.num_items)
  found = call(params, "search", catalogue, states, width=width, exclude=exclude[None])
  items, scores = np.asarray(found.items[0, :top]), np.asarray(found.log_probs[0, :top])
  return items[items >= 0], scores[items >= 0]


def main(argv: list[str]) -> None:
  """Prints the history and the recommended items with titles, semantic IDs and scores."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  options = flags.FLAGS
  keep_compiled()
  try:
    if options.top < 1:
      raise InputError(f"--top must be at least 1, got {options.top}")
    dataset, ids, model, params, catalogue, config = restore(
      pathlib.Path(options.workdir),
      tokenizer=options.tokenizer and pathlib.Path(options.tokenizer),
      features=options.features and pathlib.Path(options.features),
      trusted=options.trust,
    )
    history = parse_history(options.history, num_items=dataset.num_items)
    times = parse_times(options.times, count=len(history))
    if model.settings.time_buckets and times is None:
      raise InputError("--times: this recommender looks at the time between interactions, give the second of each")
    items, scores = recommend(
      model,
      params,
      catalogue,
      history,
      top=options.top,
      beam_width=config.evaluation.beam_width,
      repeat=options.repeat,
      times=times,
    )
  except InputError as error:
    refuse(error)

  def line(item):
    code = "" if ids is None else " ".join(f"{value:3d}" for value in ids.codes[item]) + "  "
    return f"{item:6d}  {code}{printable(dataset.titles[item])}"

  print("history:", *(" " * 16 + line(item) for item in history), sep="\n")
  rows = enumerate(zip(items, scores, strict=True), 1)
  print("recommended:", *(f"{rank:4d}  {score:8.3f}  {line(item)}" for rank, (item, score) in rows), sep="\n")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "The workdir of a finished run.")
  flags.DEFINE_string("history", None, "Item numbers in time order, separated by commas.")
  flags.DEFINE_string("times", None, "The second of each interaction, for a recommender with time buckets.")
  flags.DEFINE_string("tokenizer", None, "Semantic IDs that bbqrec_jax.assign extended by new items.")
  flags.DEFINE_string("features", None, "The new items' features, for a recommender that reads features.")
  flags.DEFINE_integer("top", 10, "How many items to recommend.")
  flags.DEFINE_bool("repeat", False, "Whether items of the history may be recommended again.")
  flags.DEFINE_list("trust", [], "Python modules of yours that the run's config may name its head or backbone from.")
  flags.mark_flags_as_required(["workdir", "history"])
  app.run(main)
