"""Recommends from a finished run: `python -m bbqrec_jax.recommend --workdir=DIR --history=3,17,256`.

`--histories=FILE --output=FILE` in place of `--history` does so for every line of a file.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import app, flags

from bbqrec_jax.command_line import define_path, define_run_flags, parse_flags, quiet_flags, writing
from bbqrec_jax.compilation import keep_compiled
from bbqrec_jax.data.directory import read_sequences, read_timestamps, time_places
from bbqrec_jax.data.interactions import Interactions, distinct_items, from_lengths
from bbqrec_jax.data.pipeline import ordinary_width, ranking_batches
from bbqrec_jax.data.times import in_seconds_as, long_gaps
from bbqrec_jax.errors import InputError, printable, refuse
from bbqrec_jax.input_files import check_new
from bbqrec_jax.models.apply import apply
from bbqrec_jax.models.catalogue import Catalogue
from bbqrec_jax.models.recommender import Recommender
from bbqrec_jax.restoring import restore
from bbqrec_jax.train.logging import warn


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
  one = from_lengths(history, np.array([len(history)]), np.array(["history"]), times)
  ((_, items, scores),) = recommend_all(model, params, catalogue, one, top=top, beam_width=beam_width, repeat=repeat)
  return items, scores


def recommend_all(
  model: Recommender,
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
      found = call(params, "search", catalogue, states, width=width, exclude=exclude, past=model.past(batch))
      every = np.asarray(found.items)[:, :top], np.asarray(found.log_probs)[:, :top]
      answers |= dict(zip(places.tolist(), zip(*every, strict=True), strict=False))  # Without the rows that only fill.
    for place, user in enumerate(users):
      items, scores = answers[place]
      yield str(histories.users[user]), items[items >= 0], scores[items >= 0]


def write_recommendations(found: Iterator[tuple[str, np.ndarray, np.ndarray]], path: pathlib.Path) -> int:
  """Writes what `recommend_all` yields as lines of JSON, `{"user", "items", "scores"}`; the file is whole or not there.

  Returns:
    How many lines there are.
  """
  unfinished, count = path.with_name(path.name + ".unfinished"), 0
  with open(unfinished, "w", encoding="utf-8") as file:
    for user, items, scores in found:
      rounded = [round(score, 4) for score in scores.tolist()]
      file.write(json.dumps({"user": user, "items": items.tolist(), "scores": rounded}) + "\n")
      count += 1
  os.replace(unfinished, path)
  return count


def check_options(options: Any) -> None:
  """Refuses flags that do not go together, and an output that cannot be written, before anything is read.

  Raises:
    InputError: naming the flag.
  """
  if options.top < 1:
    raise InputError(f"--top must be at least 1, got {options.top}")
  if (options.history is None) == (options.histories is None):
    raise InputError("give either --history=3,17,256 or --histories=FILE, a line 'user item item ...' each")
  if (options.histories is None) != (options.output is None):
    raise InputError("--output=FILE goes with --histories=FILE: what is recommended for a file is written to a file")
  other = "times" if options.history is None else "timestamps"
  if getattr(options, other) is not None:
    raise InputError(f"--{other}: --times goes with --history, --timestamps with --histories")
  if options.output is not None:
    check_new(options.output)
    if not options.output.parent.is_dir():
      raise InputError(f"{options.output.parent} is no folder: make it, or choose another --output")


def asked_for(options: Any, *, num_items: int, time_unit: str) -> Interactions:
  """The histories that the flags give, with times in seconds where they give some.

  Args:
    options: the flags.
    num_items: N.
    time_unit: of the data that the recommender was trained on, and of the times.

  Raises:
    InputError: naming the flag, or the file and line.
  """
  if options.histories is None:
    history = parse_history(options.history, num_items=num_items)
    times = parse_times(options.times, count=len(history))
    if times is not None:
      times = in_seconds_as(times, time_unit, where=lambda index: f"--times entry {index + 1}")
    return from_lengths(history, np.array([len(history)]), np.array(["history"]), times)
  histories = read_sequences(options.histories, num_items=num_items)
  if not histories.num_users:
    raise InputError(f"{options.histories}: expected a line a user, 'user item item ...', got an empty file")
  if options.timestamps is None:
    return histories
  times = read_timestamps(options.timestamps, histories)
  where = time_places(options.timestamps, histories)
  return dataclasses.replace(histories, times=in_seconds_as(times, time_unit, where=where))


def main(argv: list[str]) -> None:
  """Prints the history and the recommended items with titles, semantic IDs and scores, or writes those of a file."""
  del argv
  options = quiet_flags()
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
    histories = asked_for(options, num_items=dataset.num_items, time_unit=dataset.time_unit)
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
      count = write_recommendations(found, options.output)
    print(f"recommendations for {count} users, in {options.output}")
    return
  ((_, items, scores),) = found

  def line(item):
    code = "" if ids is None else " ".join(f"{value:3d}" for value in ids.codes[item]) + "  "
    return f"{item:6d}  {code}{printable(dataset.titles[item])}"

  print("history:", *(" " * 16 + line(item) for item in histories.items), sep="\n")
  rows = enumerate(zip(items, scores, strict=True), 1)
  if not len(items):
    print("nothing is left to recommend: the history holds every item; --repeat recommends those again")
    return
  print("recommended:", *(f"{rank:4d}  {score:8.3f}  {line(item)}" for rank, (item, score) in rows), sep="\n")


if __name__ == "__main__":
  define_run_flags()
  flags.DEFINE_string("history", None, "Item numbers in time order, separated by commas.")
  flags.DEFINE_string("times", None, "When each interaction was, in the unit of the data, for one with time buckets.")
  define_path("histories", "A file in place of --history: a line a user, 'user item item ...'.")
  define_path("timestamps", "A file with the time of each interaction in place of its item, in the unit of the data.")
  define_path("output", "The file for what is recommended for --histories: a JSON object a line.")
  define_path("tokenizer", "Semantic IDs that bbqrec_jax.assign extended by new items.")
  define_path("features", "The new items' features, for a recommender that reads features.")
  flags.DEFINE_integer("top", 10, "How many items to recommend.")
  flags.DEFINE_bool("repeat", False, "Whether items of the history may be recommended again.")
  app.run(main, flags_parser=parse_flags)
