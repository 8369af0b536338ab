"""Preparation on more than one machine: what makes a log small, as transforms of Apache Beam.

    pip install 'bbqrec_jax[beam]'
    prepare_with_beam(["/mnt/logs/1.csv"], ...)  # Files that every worker can open: a mounted bucket, a shared disk.

Reading, duplicates, the k-core and the join with the item table run wherever Beam runs; what is left of a log after
that is a fraction, which one machine numbers and writes as `prepare` does. The files of the data set are those that
`prepare` alone makes, to the byte, and the same rows are set aside.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam import pvalue

from bbqrec_jax.data.preparation.beam_transforms import (
  ASIDE,
  COUNTS,
  UNUSED,
  Core,
  ExactOnce,
  HasRequired,
  InSeconds,
  JoinItems,
  OfUsableItems,
  OncePerItem,
  ReadItems,
  ReadLog,
  kinds_in,
)
from bbqrec_jax.data.preparation.columns import said
from bbqrec_jax.data.preparation.items import item_columns
from bbqrec_jax.data.preparation.logs import Log, Numbering, log_columns, units_in_words
from bbqrec_jax.data.preparation.prepare import Source, prepare_source, settings_of
from bbqrec_jax.data.preparation.quarantine import Quarantine
from bbqrec_jax.data.preparation.settings import PreparationSettings
from bbqrec_jax.data.preparation.tables import open_table
from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.files import check_new, local_path


def prepare_with_beam(
  logs: Sequence[str | Path],
  output: str | Path,
  *,
  items: Sequence[str | Path] = (),
  images: str | Path | None = None,
  options: Any = None,
  staging: str | Path | None = None,
  rounds: int = 12,
  pipeline: Callable[..., Any] = beam.Pipeline,
  **settings: Any,
) -> dict[str, Any]:
  """`prepare` of logs of any number and size.

  Args:
    logs: files of one kind; their rows come one after another.
    output: the folder to make.
    items: files of the item table, likewise.
    images: as for `prepare`.
    options: of the pipeline: the runner, workers and so on.
    staging: a folder that this machine and all workers can reach, for what is left of the logs; a temporary one by
      default, which does for the direct runner.
    rounds: of the k-core at most.
    pipeline: makes the pipeline of `options`.
    **settings: fields of `PreparationSettings`; of `duplicates` all but "consecutive".

  Returns:
    As `prepare`.

  Raises:
    InputError: as `prepare`, or if a setting needs the whole of a user's history before the k-core.
  """
  chosen, output = settings_of(settings), local_path(output, flag="output")
  check_new(output)
  if chosen.duplicates == "consecutive" or chosen.min_repeats > 1 or chosen.unseen_items or chosen.ties == "shuffle":
    raise InputError(
      "prepare_with_beam: expected duplicates other than consecutive, min_repeats 1, no unseen_items, and no shuffled"
      " ties"
    )
  if chosen.require and ("metadata" not in chosen.require or not items):
    raise InputError("prepare_with_beam: expected items, and metadata among what is required of them (require)")
  paths, tables = list(map(str, logs)), list(map(str, items))
  images = None if images is None else local_path(images, flag="images")
  with tempfile.TemporaryDirectory(dir=staging, prefix="bbqrec_") as folder:
    left = Path(folder)
    with pipeline(options=options) as p:
      _build(p, paths, tables, left, chosen, images=None if images is None else str(images), rounds=rounds)
    log = open_table(paths[0], what="log", columns=chosen.columns)
    columns = said(log_columns(log, chosen), log.columns)
    source = Source(log.name, lambda quarantine: _read_log(left, paths, columns, quarantine, chosen.max_bad))
    if tables:
      table = open_table(tables[0], what="item table")
      source = source._replace(
        table=table.name,
        columns=said(item_columns(table, chosen), table.columns),
        read_items=lambda quarantine: (record for _, record in sorted(_read(left, "items"), key=lambda one: one[0])),
        unused=sum(1 for _ in _read(left, "unused")),
      )
    return prepare_source(source, images, output, chosen)


def _read_log(left: Path, paths: Sequence[str], columns: str, quarantine: Quarantine, most: float) -> Log:
  """What the pipeline left of the logs; rows of them and of the item table that cannot be used go into quarantine.

  Raises:
    InputError: if there are too many of those, or nothing is left.
  """
  for one in sorted(_read(left, "aside"), key=lambda one: (one["file"], one["row"])):
    quarantine.add(**one)
  rows: Counter[str] = Counter()
  left_out = 0
  for one in _read(left, "counts"):
    rows[one["file"]] += one["rows"]
    left_out += one["left_out"]
  for file in rows:
    quarantine.check(file, rows=rows[file], most=most)
  found = sorted(_read(left, "rows"), key=lambda row: row["place"])
  if not found:
    raise InputError(
      f"{paths[0]}: expected interactions to be left after preparation, got none; lower the least numbers"
    )
  users, items = Numbering(), Numbering()
  kinds = {int(kind): count for kind, count in _read(left, "kinds")}
  return Log(
    user=users.encode(pa.array([row["user"] for row in found])),
    item=items.encode(pa.array([row["item"] for row in found])),
    time=np.array([row["time"] for row in found], np.float64) if kinds else None,
    users=list(users.numbers),
    items=list(items.numbers),
    rows=sum(rows[file] for file in {Path(path).name for path in paths}),
    left_out=left_out,
    unit=units_in_words(kinds),
    columns=columns,
  )


def _read(folder: Path, name: str) -> Iterator[Any]:
  for path in sorted(folder.glob(f"{name}-*")):
    with path.open(encoding="utf-8") as lines:
      yield from map(json.loads, lines)


def _build(
  p: Any,
  logs: list[str],
  tables: list[str],
  left: Path,
  settings: PreparationSettings,
  *,
  images: str | None,
  rounds: int,
) -> None:
  """The pipeline: `rows-*`, `items-*`, `aside-*` and so on, lines of JSON, in the folder."""

  def written(what: Any, name: str) -> None:
    _ = (
      what
      | f"{name} as JSON" >> beam.Map(json.dumps)
      | f"write {name}" >> beam.io.WriteToText(str(left / name), append_trailing_newlines=True)
    )

  read = p | "logs" >> beam.Create(list(enumerate(logs))) | beam.Reshuffle() | "read logs" >> beam.ParDo(
    ReadLog(settings)
  ).with_outputs(ASIDE, COUNTS, main="rows")  # fmt: skip
  kinds = read.rows | "kinds" >> beam.FlatMap(kinds_in) | beam.combiners.Count.PerElement()
  written(kinds, "kinds")
  files = [Path(path).name for path in logs]
  timed = read.rows | "in seconds" >> beam.ParDo(InSeconds(files), pvalue.AsDict(kinds)).with_outputs(
    ASIDE, main="rows"
  )
  rows, records = timed.rows, None
  if tables:
    records = p | "tables" >> beam.Create(list(enumerate(tables))) | "read tables" >> beam.ParDo(
      ReadItems(settings)
    ).with_outputs(ASIDE, COUNTS, main="records")  # fmt: skip
    if settings.require:
      have = records.records | "what items have" >> beam.ParDo(HasRequired(settings.require, images))
      rows = (rows, have) | OfUsableItems()
  if settings.duplicates in ("first", "last"):
    rows = rows | OncePerItem(last=settings.duplicates == "last")
  if settings.duplicates == "exact":
    with_time = rows | "with a time" >> beam.Filter(lambda row: row.time is not None) | ExactOnce()
    rows = (with_time, rows | "without a time" >> beam.Filter(lambda row: row.time is None)) | beam.Flatten()
  rows = rows | Core(per_user=settings.min_per_user, per_item=settings.min_per_item, rounds=rounds)
  written(rows | "as objects" >> beam.Map(lambda row: row._asdict()), "rows")
  aside, counts = [read[ASIDE], timed[ASIDE]], [read[COUNTS]]
  if records is not None:
    wanted = rows | "items" >> beam.Map(lambda row: row.item) | beam.Distinct()
    joined = (wanted, records.records) | JoinItems()
    written(joined.items, "items")
    written(joined[UNUSED], UNUSED)
    aside += [records[ASIDE], joined[ASIDE]]
    counts.append(records[COUNTS])
  written(tuple(aside) | "all aside" >> beam.Flatten(), ASIDE)
  written(tuple(counts) | "all counts" >> beam.Flatten(), COUNTS)
