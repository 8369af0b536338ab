"""Recommends from a finished run.

    bbqrec recommend --workdir=runs/mine --history=SKU-1,SKU-2 --top=10
    bbqrec recommend --workdir=runs/mine --user=U17
    bbqrec recommend --workdir=runs/mine --titles='red mug,oak table' --deny=@sold_out.txt
    bbqrec recommend --workdir=runs/mine --histories=FILE --output=recommended.jsonl

Items go in and come out by the ids of the run's data. `--user=ID` takes the history of one of its users, `--titles` one
of items that are called nearly so, and `--histories=FILE --output=FILE` does so for every line of a file.
"""

import dataclasses
from typing import Any

from absl import flags

from bbqrec_jax.command_line import define_path, define_run_flags, quiet_flags, start, writing
from bbqrec_jax.errors import InputError, as_given, printable, refuse
from bbqrec_jax.utils.files import check_new


def check_options(options: Any) -> None:
  """Refuses flags that do not go together, and an output that cannot be written, before anything is read.

  Raises:
    InputError: naming the flag.
  """
  if options.top < 1:
    raise InputError(f"--top must be at least 1, got {options.top}")
  if sum(value is not None for value in (options.history, options.titles, options.user, options.histories)) != 1:
    raise InputError(
      "give one of --history=3,17,256, --user=ID (of the run's data), --titles='red mug,oak table' and"
      " --histories=FILE, a line 'user item item ...' each"
    )
  if (options.histories is None) != (options.output is None):
    raise InputError("--output=FILE goes with --histories=FILE: what is recommended for a file is written to a file")
  for name, with_name in (("times", "history"), ("timestamps", "histories")):
    if getattr(options, name) is not None and getattr(options, with_name) is None:
      raise InputError(f"--{name}: --times goes with --history, --timestamps with --histories")
  if options.output is not None:
    if options.output.suffix == ".gz":
      raise InputError(
        f"--output={options.output}: expected .jsonl or .parquet, which is compressed, got .gz; leave"
        " .gz away, and compress the file afterwards"
      )
    check_new(options.output)
    if not options.output.parent.is_dir():
      raise InputError(f"{options.output.parent} is no folder: make it, or choose another --output")


def asked_for(options: Any, dataset: Any) -> Any:
  """The histories that the flags give, with times in seconds where they give some.

  Args:
    options: the flags.
    dataset: that the recommender was trained on; ids and the unit of times are its.

  Raises:
    InputError: naming the flag, or the file and line.
  """
  import numpy as np

  from bbqrec_jax.data.directory import read_timestamps, time_places
  from bbqrec_jax.data.histories import read_histories
  from bbqrec_jax.data.interactions import from_lengths
  from bbqrec_jax.data.times import in_seconds_as
  from bbqrec_jax.data.titles import require_titles
  from bbqrec_jax.serving.recommend import history_of, parse_history, parse_times

  if options.user is not None:
    return history_of(options.user, dataset.interactions)
  if options.titles is not None:
    rows = require_titles(options.titles, dataset.titles, flag="--titles")
    return from_lengths(rows, np.array([len(rows)]), np.array(["history"]))
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
  from bbqrec_jax.data.times import long_gaps
  from bbqrec_jax.data.titles import listed_items
  from bbqrec_jax.runs.restore import restore
  from bbqrec_jax.serving.recommend import left_out, recommend_all, write_recommendations
  from bbqrec_jax.utils.compilation import keep_compiled
  from bbqrec_jax.utils.environment import settle_jax
  from bbqrec_jax.utils.messages import warn

  options = quiet_flags()
  settle_jax()
  keep_compiled()
  try:
    check_options(options)
    dataset, ids, model, params, catalogue, config, *_ = restore(
      options.workdir,
      data=options.data,
      tokenizer=options.tokenizer,
      features=options.features,
      trusted=options.trust,
    )
    histories = asked_for(options, dataset)
    allow, deny = (
      None if given is None else listed_items(given, dataset.item_ids, flag=flag)
      for flag, given in (("--allow", options.allow), ("--deny", options.deny))
    )
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
    exclude=left_out(allow, deny, num_items=catalogue.num_items),
  )
  if many:
    with writing(options.output):
      count = write_recommendations(found, options.output, dataset.item_ids)
    print(f"recommendations for {count} users, in {as_given(str(options.output))}")
    return
  ((_, items, scores),) = found

  def line(item):
    code = "" if ids is None else " ".join(f"{value:3d}" for value in ids.codes[item]) + "  "
    return f"{printable(str(dataset.item_ids[item])):>6s}  {code}{printable(dataset.titles[item])}"

  print("history:", *(" " * 16 + line(item) for item in histories.items), sep="\n")
  rows = enumerate(zip(items, scores, strict=True), 1)
  if not len(items):
    print("nothing is left to recommend: every item is in the history (--repeat recommends those again) or left out")
    return
  print("recommended:", *(f"{rank:4d}  {score:8.3f}  {line(item)}" for rank, (item, score) in rows), sep="\n")


def program() -> None:
  """Defines the flags and runs the program."""
  define_run_flags()
  flags.DEFINE_string("history", None, "Ids of items in time order, separated by commas; 'a,\"b,c\"' as in CSV.")
  flags.DEFINE_string("user", None, "In place of --history: the id of a user of the run's data, with all of its items.")
  flags.DEFINE_string("titles", None, "In place of --history: titles, or words of them, separated by commas.")
  flags.DEFINE_string("allow", None, "Recommend these items alone: ids separated by commas, or @FILE, an id a line.")
  flags.DEFINE_string("deny", None, "Never recommend these items, likewise.")
  flags.DEFINE_string("times", None, "When each interaction was, in the unit of the data, for one with time buckets.")
  lines, times = "a line per user, 'user item item ...', .jsonl or .parquet", "in the unit of the data"
  define_path("histories", f"A file in place of --history: {lines}.", use="read")
  define_path("timestamps", f"A file with the time of each interaction in place of its item, {times}.", use="read")
  recommended = "The file for what is recommended for --histories: one JSON object per line, or .parquet."
  define_path("output", recommended, use="write")
  define_path("tokenizer", "Semantic IDs that `bbqrec assign` extended by new items.", use="read")
  define_path("features", "The new items' features, for a recommender that reads features.", use="read")
  flags.DEFINE_integer("top", 10, "How many items to recommend.")
  flags.DEFINE_bool("repeat", False, "Whether items of the history may be recommended again.")
  start(main)
