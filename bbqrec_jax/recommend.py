"""Recommends from a finished run: `python -m bbqrec_jax.recommend --workdir=DIR --history=3,17,256`.

Items go in and come out by the ids of the run's data. `--user=ID` takes the history of one of its users, and
`--histories=FILE --output=FILE` does so for every line of a file.
"""

import csv
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags

from bbqrec_jax.command_line import define_path, define_run_flags, quiet_flags, start, writing
from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.directory import read_timestamps, time_places
from bbqrec_jax.data.histories import read_histories
from bbqrec_jax.data.interactions import Interactions, choose, distinct_items, from_lengths
from bbqrec_jax.data.item_ids import ItemIds, nearest, split_ids
from bbqrec_jax.data.pipeline import ordinary_width, ranking_batches
from bbqrec_jax.data.times import in_seconds_as, long_gaps
from bbqrec_jax.errors import InputError, printable, refuse, shown
from bbqrec_jax.layers.apply import apply
from bbqrec_jax.recommender.catalogue import Catalogue
from bbqrec_jax.recommender.model import SequenceModel
from bbqrec_jax.runs.restore import restore
from bbqrec_jax.utils.compilation import keep_compiled
from bbqrec_jax.utils.environment import settle_jax
from bbqrec_jax.utils.files import check_new, unfinished
from bbqrec_jax.utils.messages import warn


def parse_history(text: str, item_ids: ItemIds) -> np.ndarray:
  """Item rows [n] int32 from ids as "3,17,256"; see `split_ids`.

  Raises:
    InputError: if an entry is not the id of an item.
  """
  try:
    entries = split_ids(text)
  except csv.Error as error:
    raise InputError(f"--history: expected ids separated by commas, got {shown(text)} ({error})") from None
  return item_ids.require(entries, where=lambda place: f"--history entry {place + 1}")


def history_of(user: str, interactions: Interactions) -> Interactions:
  """The whole history of one user.

  Raises:
    InputError: if there is no such user; names those that are nearest.
  """
  found = np.flatnonzero(interactions.users == user)
  if not len(found):
    hint = nearest(user, interactions.users.tolist())
    raise InputError(f"--user: expected the id of a user of the run's data, got {shown(user)}; {hint}")
  (row,) = found
  own = np.arange(*interactions.offsets[row : row + 2])
  return choose(interactions, own, interactions.lengths[found], interactions.users[found])


def parse_times(text: str | None, *, count: int) -> np.ndarray | None:
  """Times [n] float64 from "874965478,874965518"; None for None.

  Raises:
    InputError: if they are not `count` finite numbers in time order.
  """
  if text is None:
    return None
  try:
    times = np.array(text.split(","), np.float64)
  except ValueError:
    times = np.array([np.nan])
  if len(times) != count or not np.isfinite(times).all() or np.any(times[1:] < times[:-1]):
    raise InputError(f"--times: expected {count} numbers in time order, one for each item of --history, got {text!r}")
  return times


def recommend(
  model: SequenceModel,
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
  one = from_lengths(history, np.array([len(history)]), np.array(["history"]), times)
  ((_, items, scores),) = recommend_all(model, params, catalogue, one, top=top, beam_width=beam_width, repeat=repeat)
  return items, scores


def recommend_all(
  model: SequenceModel,
  params: Any,
  catalogue: Catalogue,
  histories: Interactions,
  *,
  top: int,
  beam_width: int,
  repeat: bool = False,
  batch_size: int = 256,
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
  """The best next items of every history, one after another.

  Args:
    model: as for `recommend`, and so are `params`, `catalogue`, `top`, `beam_width` and `repeat`.
    params: see there.
    catalogue: see there.
    histories: of the users, with times for a model with time buckets.
    top: see there.
    beam_width: see there.
    repeat: see there.
    batch_size: histories that are ranked at once.

  Yields:
    (user, items [top], scores [top]) of each user, in order.

  Raises:
    InputError: if a history is empty.
  """
  if not np.all(histories.lengths):
    nobody = str(histories.users[int(np.argmin(histories.lengths))])
    raise InputError(
      f"history of {nobody!r}: expected at least one item, got none, and nothing tells what comes next; recommend what"
      " is popular"
    )
  call = jax.jit(functools.partial(apply, model), static_argnums=1, static_argnames="width")
  width = min(max(beam_width, top), catalogue.num_items)
  batch_size = min(batch_size, histories.num_users)
  seen = None if repeat else distinct_items(histories)
  batches = functools.partial(
    ranking_batches,
    histories,
    np.zeros(histories.num_users, np.int32),
    batch_size=batch_size,
    max_length=model.settings.max_length,
    exclude=seen,
    width=1 if seen is None else ordinary_width(seen),
  )
  for first in range(0, histories.num_users, batch_size):
    users = np.arange(first, min(first + batch_size, histories.num_users))
    answers: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for places, batch in batches(users=users):
      exclude = batch.pop("exclude", None)
      states = call(params, "last_states", catalogue, batch)
      found = call(params, "search", catalogue, states, width=width, exclude=exclude, seen=model.seen(batch))
      every = np.asarray(found.items)[:, :top], np.asarray(found.log_probs)[:, :top]
      answers |= dict(zip(places.tolist(), zip(*every, strict=True), strict=False))  # Without the rows that only fill.
    for place, user in enumerate(users):
      items, scores = answers[place]
      yield str(histories.users[user]), items[items >= 0], scores[items >= 0]


def write_recommendations(
  found: Iterator[tuple[str, np.ndarray, np.ndarray]], path: pathlib.Path, item_ids: ItemIds
) -> int:
  """Writes what `recommend_all` yields as lines of JSON, `{"user", "items", "scores"}`; the file is whole or not there.

  Items are written by their ids.

  Returns:
    How many lines there are.
  """
  count = 0
  with open(unfinished(path), "w", encoding="utf-8") as file:
    for user, items, scores in found:
      rounded = [round(score, 4) for score in scores.tolist()]
      file.write(json.dumps({"user": user, "items": [item_ids[item] for item in items], "scores": rounded}) + "\n")
      count += 1
  os.replace(unfinished(path), path)
  return count


def check_options(options: Any) -> None:
  """Refuses flags that do not go together, and an output that cannot be written, before anything is read.

  Raises:
    InputError: naming the flag.
  """
  if options.top < 1:
    raise InputError(f"--top must be at least 1, got {options.top}")
  if sum(value is not None for value in (options.history, options.user, options.histories)) != 1:
    raise InputError(
      "give one of --history=3,17,256, --user=ID (of the run's data) and --histories=FILE, a line 'user item item ...'"
      " each"
    )
  if (options.histories is None) != (options.output is None):
    raise InputError("--output=FILE goes with --histories=FILE: what is recommended for a file is written to a file")
  for name, with_name in (("times", "history"), ("timestamps", "histories")):
    if getattr(options, name) is not None and getattr(options, with_name) is None:
      raise InputError(f"--{name}: --times goes with --history, --timestamps with --histories")
  if options.output is not None:
    check_new(options.output)
    if not options.output.parent.is_dir():
      raise InputError(f"{options.output.parent} is no folder: make it, or choose another --output")


def asked_for(options: Any, dataset: Dataset) -> Interactions:
  """The histories that the flags give, with times in seconds where they give some.

  Args:
    options: the flags.
    dataset: that the recommender was trained on; ids and the unit of times are its.

  Raises:
    InputError: naming the flag, or the file and line.
  """
  if options.user is not None:
    return history_of(options.user, dataset.interactions)
  if options.histories is None:
    history = parse_history(options.history, dataset.item_ids)
    times = parse_times(options.times, count=len(history))
    if times is not None:
      times = in_seconds_as(times, dataset.time_unit, where=lambda index: f"--times entry {index + 1}")
    return from_lengths(history, np.array([len(history)]), np.array(["history"]), times)
  histories = read_histories(options.histories, dataset.item_ids)
  if options.timestamps is None:
    return histories
  times = read_timestamps(options.timestamps, histories)
  where = time_places(options.timestamps, histories)
  return dataclasses.replace(histories, times=in_seconds_as(times, dataset.time_unit, where=where))


def main(argv: list[str]) -> None:
  """Prints the history and the recommended items with titles, semantic IDs and scores, or writes those of a file."""
  del argv
  options = quiet_flags()
  settle_jax()
  keep_compiled()
  try:
    check_options(options)
    dataset, ids, model, params, catalogue, config = restore(
      options.workdir,
      data=options.data,
      tokenizer=options.tokenizer,
      features=options.features,
      trusted=options.trust,
    )
    histories = asked_for(options, dataset)
    many = options.histories is not None
    if model.settings.time_buckets and histories.times is None:
      flag = "--timestamps" if many else "--times"
      raise InputError(f"{flag}: this recommender looks at the time between interactions, give the time of each")
  except InputError as error:
    refuse(error)
  for sentence in long_gaps(histories):
    warn(sentence)
  found = recommend_all(
    model,
    params,
    catalogue,
    histories,
    top=options.top,
    beam_width=config.evaluation.beam_width,
    repeat=options.repeat,
    batch_size=config.evaluation.batch_size,
  )
  if many:
    with writing(options.output):
      count = write_recommendations(found, options.output, dataset.item_ids)
    print(f"recommendations for {count} users, in {options.output}")
    return
  ((_, items, scores),) = found

  def line(item):
    code = "" if ids is None else " ".join(f"{value:3d}" for value in ids.codes[item]) + "  "
    return f"{printable(str(dataset.item_ids[item])):>6s}  {code}{printable(dataset.titles[item])}"

  print("history:", *(" " * 16 + line(item) for item in histories.items), sep="\n")
  rows = enumerate(zip(items, scores, strict=True), 1)
  if not len(items):
    print("nothing is left to recommend: the history holds every item; --repeat recommends those again")
    return
  print("recommended:", *(f"{rank:4d}  {score:8.3f}  {line(item)}" for rank, (item, score) in rows), sep="\n")


if __name__ == "__main__":
  define_run_flags()
  flags.DEFINE_string("history", None, "Ids of items in time order, separated by commas; 'a,\"b,c\"' as in CSV.")
  flags.DEFINE_string("user", None, "In place of --history: the id of a user of the run's data, with all of its items.")
  flags.DEFINE_string("times", None, "When each interaction was, in the unit of the data, for one with time buckets.")
  define_path("histories", "A file in place of --history: a line a user, 'user item item ...', or JSON (.jsonl).")
  define_path("timestamps", "A file with the time of each interaction in place of its item, in the unit of the data.")
  define_path("output", "The file for what is recommended for --histories: a JSON object a line.")
  define_path("tokenizer", "Semantic IDs that bbqrec_jax.assign extended by new items.")
  define_path("features", "The new items' features, for a recommender that reads features.")
  flags.DEFINE_integer("top", 10, "How many items to recommend.")
  flags.DEFINE_bool("repeat", False, "Whether items of the history may be recommended again.")
  start(main)
