"""Preparation on more than one machine: what makes a log small, as transforms of Apache Beam.

    pip install 'bbqrec_jax[beam]'
    prepare_with_beam(["gs://..."], ...)  # Files that every worker can open: a mounted bucket, a shared disk.

Reading, exact duplicates, the k-core and the join with the item table run wherever Beam runs; what is left of a log
after that is a fraction, which one machine numbers and writes as `prepare` does. The files of the data set are those
that `prepare` alone makes, to the byte, and the same rows are set aside.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam import pvalue

from bbqrec_jax.data.encoding.words import HashedWords
from bbqrec_jax.data.preparation.columns import said
from bbqrec_jax.data.preparation.items import KNOWN, item_columns, read_item, wanted_columns
from bbqrec_jax.data.preparation.logs import (
  Log,
  Numbering,
  kinds_of,
  log_columns,
  odd_time,
  seconds_of,
  units_in_words,
  usable_rows,
  usual_kind,
)
from bbqrec_jax.data.preparation.prepare import Source, prepare_source, settings_of
from bbqrec_jax.data.preparation.quarantine import Quarantine
from bbqrec_jax.data.preparation.settings import PreparationSettings
from bbqrec_jax.data.preparation.tables import open_table
from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.files import check_new, local_path

_ASIDE, _COUNTS, _UNUSED = "aside", "counts", "unused"  # What there is beside the rows and items.
_TEXTS = 1024  # That are encoded at once.


class Row(NamedTuple):
  """An interaction: ids, its second (None without times), and where it stands, by which everything is ordered."""

  user: str
  item: str
  time: float | None
  place: tuple[int, int]  # The number of the file, and of the row in it.


class _Collected(Quarantine):
  """Rows that cannot be used, held to be passed on."""

  def __init__(self) -> None:
    super().__init__(Path())
    self.rows: list[dict[str, Any]] = []
    self.total = 0

  def add(self, file: str, row: int, reason: str, text: object) -> None:
    self.rows.append({"file": file, "row": int(row), "reason": reason, "text": str(text)[:1000]})
    self.total += 1

  def passed_on(self) -> Iterator[pvalue.TaggedOutput]:
    """The rows, which are no longer held then."""
    rows, self.rows = self.rows, []
    yield from (pvalue.TaggedOutput(_ASIDE, row) for row in rows)


class _ReadLog(beam.DoFn):
  """(number, path) of a log -> (user, item, time as it stands or None, whether a date, place) of its usable rows."""

  def __init__(self, settings: PreparationSettings):
    self._settings = settings

  def process(self, element: tuple[int, str]) -> Iterator[Any]:
    number, path = element
    table = open_table(path, what="log", columns=self._settings.columns)
    names = {kind: columns[0] for kind, columns in log_columns(table, self._settings).items()}
    rows, left_out, aside = 0, 0, _Collected()
    for batch in table.batches(tuple(names.values()), aside):
      part = usable_rows(table.name, batch, names, self._settings, aside)
      times: Iterable[Any] = part.time.tolist() if "time" in names else [None] * len(part.row)
      columns = part.user.to_pylist(), part.item.to_pylist(), times, part.is_date.tolist(), part.row.tolist()
      for user, item, time, is_date, row in zip(*columns, strict=True):
        yield user, item, time, is_date, (number, row)
      rows, left_out = rows + len(part.row) + part.left_out, left_out + part.left_out
      yield from aside.passed_on()
    yield from aside.passed_on()
    yield pvalue.TaggedOutput(_COUNTS, {"file": table.name, "rows": rows + aside.total, "left_out": left_out})


def _kind(element: tuple[Any, ...]) -> Iterator[int]:
  _, _, time, is_date, _ = element
  if time is not None:
    yield int(kinds_of(np.array([time]), np.array([is_date]))[0])


class _InSeconds(beam.DoFn):
  """What `_ReadLog` gives -> `Row`, its time in seconds, those of another unit than most set aside."""

  def __init__(self, files: Sequence[str]):
    self._files = files

  def process(self, element: tuple[Any, ...], counts: dict[int, int]) -> Iterator[Any]:
    user, item, time, is_date, place = element
    second = time
    if time is not None:
      usual, one = usual_kind(counts), np.array([time])
      second = float(seconds_of(one, kinds_of(one, np.array([is_date])), usual)[0])
      if np.isnan(second):
        held = _Collected()
        held.add(self._files[place[0]], place[1], odd_time(usual), f"{time:.15g}")
        yield from held.passed_on()
        return
    yield Row(user, item, second, place)


class ExactOnce(beam.PTransform):
  """Of rows of the same user, item and time only the first; rows without times stay all."""

  def expand(self, rows: Any) -> Any:
    """See the class."""
    first = (
      rows
      | "by all" >> beam.Map(lambda row: ((row.user, row.item, row.time), row.place))
      | "first of all" >> beam.CombinePerKey(min)
      | "as rows" >> beam.Map(lambda pair: Row(pair[0][0], pair[0][1], pair[0][2], pair[1]))
    )
    return first


class Core(beam.PTransform):
  """The k-core of rows: users and items with too few of them left out, until nothing changes.

  Beam knows no loops, so there are as many rounds as are said; if one more would change something, that is an error.
  """

  def __init__(self, *, per_user: int, per_item: int, rounds: int = 12):
    """Says how many rows a user and an item must have, and how many rounds there are at most."""
    super().__init__()
    self._least, self._rounds = {"user": per_user, "item": per_item}, rounds

  def expand(self, rows: Any) -> Any:
    """See the class."""
    for round_ in range(self._rounds):
      for kind, least in self._least.items():
        rows = rows | f"{kind}s of round {round_}" >> _Enough(kind, least)
    checked = [
      rows | f"{kind}s at the end" >> _Enough(kind, least, rounds=self._rounds) for kind, least in self._least.items()
    ]
    return checked[-1]


class _Enough(beam.PTransform):
  """The rows of users, or items, that have enough; after the last round all rows, and an error if some have not."""

  def __init__(self, kind: str, least: int, *, rounds: int = 0):
    super().__init__()
    self._kind, self._least, self._rounds = kind, least, rounds

  def expand(self, rows: Any) -> Any:
    kind, least, rounds = self._kind, self._least, self._rounds

    def enough(group: tuple[str, Iterable[Row]]) -> list[Row]:
      mine = list(group[1])
      if rounds and len(mine) < least:
        raise InputError(f"the k-core needs more than {rounds} rounds; give a higher number of rounds")
      return mine if len(mine) >= least else []

    return (
      rows
      | beam.Map(lambda row: (getattr(row, kind), row))
      | beam.GroupByKey()
      | beam.FlatMap(enough).with_output_types(Row)
    )


class _ReadItems(beam.DoFn):
  """(number, path) of an item table -> (id, (place, the object that items.jsonl holds, the file's name))."""

  def __init__(self, settings: PreparationSettings):
    self._settings = settings

  def process(self, element: tuple[int, str]) -> Iterator[Any]:
    number, path = element
    table = open_table(path, what="item table")
    chosen = item_columns(table, self._settings)
    rows, aside = 0, _Collected()
    for batch in table.batches(wanted_columns(chosen), aside):
      for row, record in read_item(table.name, batch, chosen, aside):
        rows += 1
        yield record["id"], ((number, row), record, table.name)
      yield from aside.passed_on()
    yield from aside.passed_on()
    yield pvalue.TaggedOutput(_COUNTS, {"file": table.name, "rows": rows + aside.total, "left_out": 0})


class JoinItems(beam.PTransform):
  """(ids that are wanted, (id, (place, record, file))) -> (place, record) of those wanted, the first of each.

  Beside them, tagged, rows with an id that came before, and the ids that nobody wants.
  """

  def expand(self, both: Any) -> Any:
    """See the class."""
    wanted, records = both

    def first(group: tuple[str, dict[str, Iterable[Any]]]) -> Iterator[Any]:
      item, found = group
      aside = _Collected()
      for number, (place, record, file) in enumerate(sorted(found["records"], key=lambda one: one[0])):
        if number:
          aside.add(file, place[1], KNOWN, item)
        elif any(True for _ in found["wanted"]):
          yield place, record
        else:
          yield pvalue.TaggedOutput(_UNUSED, item)
      yield from aside.passed_on()

    return (
      {"wanted": wanted | beam.Map(lambda item: (item, True)), "records": records}
      | beam.CoGroupByKey()
      | beam.FlatMap(first).with_outputs(_ASIDE, _UNUSED, main="items")
    )


class EncodeTexts(beam.PTransform):
  """(id, text) -> (id, features [width] float16), by what `bbqrec features` learned of words."""

  def __init__(self, arrays: dict[str, np.ndarray], *, tokens: bool = False):
    """Takes the arrays of `HashedWords.arrays`, and whether a text is a list of tokens."""
    super().__init__()
    self._arrays, self._tokens = arrays, tokens

  def expand(self, texts: Any) -> Any:
    """See the class."""
    return (
      texts
      | beam.BatchElements(min_batch_size=1, max_batch_size=_TEXTS)
      | beam.ParDo(_Encode(self._arrays, tokens=self._tokens))
    )


class _Encode(beam.DoFn):
  def __init__(self, arrays: dict[str, np.ndarray], *, tokens: bool):
    self._arrays, self._tokens = arrays, tokens

  def setup(self) -> None:
    self._words = HashedWords(width=2, seed=0, tokens=self._tokens)
    self._words.restore(self._arrays)

  def process(self, batch: list[tuple[str, Any]]) -> Iterator[tuple[str, np.ndarray]]:
    vectors = self._words.encode([text for _, text in batch]).astype(np.float16)
    yield from zip((name for name, _ in batch), vectors, strict=True)


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
    **settings: fields of `PreparationSettings`; of `duplicates` "exact" and "keep" alone.

  Returns:
    As `prepare`.

  Raises:
    InputError: as `prepare`, or if a setting needs the whole of a user's history before the k-core.
  """
  chosen, output = settings_of(settings), local_path(output, flag="output")
  check_new(output)
  if (
    chosen.duplicates not in ("exact", "keep")
    or chosen.min_repeats > 1
    or chosen.unseen_items
    or chosen.ties == "shuffle"
  ):
    raise InputError(
      "prepare_with_beam: expected duplicates exact or keep, min_repeats 1, no unseen_items, and no shuffled ties"
    )
  paths, tables = list(map(str, logs)), list(map(str, items))
  with tempfile.TemporaryDirectory(dir=staging, prefix="bbqrec_") as folder:
    left = Path(folder)
    with pipeline(options=options) as p:
      _build(p, paths, tables, left, chosen, rounds=rounds)
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
  p: Any, logs: list[str], tables: list[str], left: Path, settings: PreparationSettings, *, rounds: int
) -> None:
  """The pipeline: `rows-*`, `items-*`, `aside-*` and so on, lines of JSON, in the folder."""

  def written(what: Any, name: str) -> None:
    _ = (
      what
      | f"{name} as JSON" >> beam.Map(json.dumps)
      | f"write {name}" >> beam.io.WriteToText(str(left / name), append_trailing_newlines=True)
    )

  read = p | "logs" >> beam.Create(list(enumerate(logs))) | beam.Reshuffle() | "read logs" >> beam.ParDo(
    _ReadLog(settings)
  ).with_outputs(_ASIDE, _COUNTS, main="rows")  # fmt: skip
  kinds = read.rows | "kinds" >> beam.FlatMap(_kind) | beam.combiners.Count.PerElement()
  written(kinds, "kinds")
  files = [Path(path).name for path in logs]
  timed = read.rows | "in seconds" >> beam.ParDo(_InSeconds(files), pvalue.AsDict(kinds)).with_outputs(
    _ASIDE, main="rows"
  )
  rows = timed.rows
  if settings.duplicates == "exact":
    with_time = rows | "with a time" >> beam.Filter(lambda row: row.time is not None) | ExactOnce()
    rows = (with_time, rows | "without a time" >> beam.Filter(lambda row: row.time is None)) | beam.Flatten()
  rows = rows | Core(per_user=settings.min_per_user, per_item=settings.min_per_item, rounds=rounds)
  written(rows | "as objects" >> beam.Map(lambda row: row._asdict()), "rows")
  aside, counts = [read[_ASIDE], timed[_ASIDE]], [read[_COUNTS]]
  if tables:
    records = p | "tables" >> beam.Create(list(enumerate(tables))) | "read tables" >> beam.ParDo(
      _ReadItems(settings)
    ).with_outputs(_ASIDE, _COUNTS, main="records")  # fmt: skip
    wanted = rows | "items" >> beam.Map(lambda row: row.item) | beam.Distinct()
    joined = (wanted, records.records) | JoinItems()
    written(joined.items, "items")
    written(joined[_UNUSED], _UNUSED)
    aside += [records[_ASIDE], joined[_ASIDE]]
    counts.append(records[_COUNTS])
  written(tuple(aside) | "all aside" >> beam.Flatten(), _ASIDE)
  written(tuple(counts) | "all counts" >> beam.Flatten(), _COUNTS)
