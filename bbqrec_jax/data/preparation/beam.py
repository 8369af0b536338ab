"""Preparation on more than one machine: what makes a log small, as transforms of Apache Beam.

    pip install 'bbqrec_jax[beam]'
    prepare_with_beam(["gs://..."], ...)  # Files that every worker can open: a mounted bucket, a shared disk.

Reading, exact duplicates, the k-core and the join with the item table run wherever Beam runs; what is left of a log
after that is a fraction, which one machine numbers and writes by `prepare`. The files of the data set are those that
`prepare` alone makes, to the byte.
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam import pvalue

from bbqrec_jax.data.encoding.words import HashedWords
from bbqrec_jax.data.preparation.items import item_columns, read_item, wanted_columns
from bbqrec_jax.data.preparation.logs import log_columns, usable_rows
from bbqrec_jax.data.preparation.prepare import prepare, settings_of
from bbqrec_jax.data.preparation.quarantine import Quarantine
from bbqrec_jax.data.preparation.settings import PreparationSettings
from bbqrec_jax.data.preparation.tables import open_table
from bbqrec_jax.data.times import UNITS, magnitude_counts
from bbqrec_jax.errors import InputError

_ASIDE = "aside"
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

  def add(self, file: str, row: int, reason: str, text: object) -> None:
    self.rows.append({"file": file, "row": int(row), "reason": reason, "text": str(text)[:1000]})


class _ReadLog(beam.DoFn):
  """(number, path) of a log -> ((user, item, time as it stands or None, whether a date), place) of its usable rows."""

  def __init__(self, settings: PreparationSettings):
    self._settings = settings

  def process(self, element: tuple[int, str]) -> Iterator[Any]:
    number, path = element
    table = open_table(path, what="log", columns=self._settings.columns)
    names = {kind: columns[0] for kind, columns in log_columns(table, self._settings).items()}
    for batch in table.batches(tuple(names.values()), aside := _Collected()):
      part = usable_rows(table.name, batch, names, self._settings, aside)
      times: Iterable[Any] = part.time.tolist() if "time" in names else [None] * len(part.row)
      columns = part.user.to_pylist(), part.item.to_pylist(), times, part.is_date.tolist(), part.row.tolist()
      for user, item, time, is_date, row in zip(*columns, strict=True):
        yield user, item, time, is_date, (number, row)
      for one in aside.rows:
        yield pvalue.TaggedOutput(_ASIDE, one)
      aside.rows.clear()


def _magnitude(element: tuple[Any, ...]) -> Iterator[int]:
  _, _, time, is_date, _ = element
  if time is not None and not is_date:
    yield int(magnitude_counts(np.array([time]))[0][0])


class _InSeconds(beam.DoFn):
  """What `_ReadLog` gives -> `Row`, its time in seconds, those of another unit than most set aside."""

  def process(self, element: tuple[Any, ...], counts: dict[int, int]) -> Iterator[Any]:
    user, item, time, is_date, place = element
    if time is not None and not is_date:
      most = min(counts, key=lambda magnitude: (-counts[magnitude], magnitude))
      unit = list(UNITS)[max(most - 1, 0)] if most <= len(UNITS) else "seconds"
      if most and int(magnitude_counts(np.array([time]))[0][0]) != most:
        reason = f"a time that is not of most times' magnitude ({unit})"
        yield pvalue.TaggedOutput(_ASIDE, {"file": place[0], "row": place[1], "reason": reason, "text": f"{time:.15g}"})
        return
      time = time / UNITS[unit]
    yield Row(user, item, time, place)


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
  """(number, path) of an item table -> (id, (place, the object that items.jsonl holds))."""

  def __init__(self, settings: PreparationSettings):
    self._settings = settings

  def process(self, element: tuple[int, str]) -> Iterator[Any]:
    number, path = element
    table = open_table(path, what="item table")
    chosen = item_columns(table, self._settings)
    aside = _Collected()
    for batch in table.batches(wanted_columns(chosen), aside):
      for row, record in read_item(table.name, batch, chosen, aside):
        yield record["id"], ((number, row), record)
      for one in aside.rows:
        yield pvalue.TaggedOutput(_ASIDE, one)
      aside.rows.clear()


class JoinItems(beam.PTransform):
  """(ids that are wanted, (id, (place, record))) -> (place, record) of those wanted, the first of each."""

  def expand(self, both: Any) -> Any:
    """See the class."""
    wanted, records = both

    def first(group: tuple[str, dict[str, Iterable[Any]]]) -> Iterator[Any]:
      if any(True for _ in group[1]["wanted"]):
        found = sorted(group[1]["records"], key=lambda pair: pair[0])
        yield from found[:1]

    return (
      {"wanted": wanted | beam.Map(lambda item: (item, True)), "records": records}
      | beam.CoGroupByKey()
      | beam.FlatMap(first)
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
  chosen = settings_of(settings)
  if (
    chosen.duplicates not in ("exact", "keep")
    or chosen.min_repeats > 1
    or chosen.unseen_items
    or chosen.ties == "shuffle"
  ):
    raise InputError(
      "prepare_with_beam: expected duplicates exact or keep, min_repeats 1, no unseen_items, and no shuffled ties"
    )
  with tempfile.TemporaryDirectory(dir=staging, prefix="bbqrec_") as folder:
    left = Path(folder)
    with pipeline(options=options) as p:
      _build(p, list(map(str, logs)), list(map(str, items)), left, chosen, rounds=rounds)
    rows = sorted(_read(left, "rows"), key=lambda row: row["place"])
    if not rows:
      raise InputError(
        f"{logs[0]}: expected interactions to be left after preparation, got none; lower the least numbers"
      )
    log: dict[str, Any] = {kind: [row[kind] for row in rows] for kind in ("user", "item")}
    if rows[0]["time"] is not None:
      log["time"] = [row["time"] for row in rows]
    table = None
    if items:
      records = [pair[1] for pair in sorted(_read(left, "items"), key=lambda pair: pair[0])]
      names = dict.fromkeys(name for record in records for name in record)
      table = {name: [record.get(name) for record in records] for name in names}
    plain = dataclasses.asdict(PreparationSettings()) | {
      name: getattr(chosen, name) for name in ("min_per_user", "min_per_item", "ties", "seed")
    }
    report = prepare(log, output, items=table, images=images, **plain | {"duplicates": "keep"})
    aside = "".join(path.read_text(encoding="utf-8") for path in sorted(left.glob("aside-*")))
    if aside:
      (Path(output) / "quarantine.jsonl").write_text(aside, encoding="utf-8")
  return report


def _read(folder: Path, name: str) -> Iterator[Any]:
  for path in sorted(folder.glob(f"{name}-*")):
    with path.open(encoding="utf-8") as lines:
      yield from map(json.loads, lines)


def _build(
  p: Any, logs: list[str], tables: list[str], left: Path, settings: PreparationSettings, *, rounds: int
) -> None:
  """The pipeline: `rows-*`, `items-*` and `aside-*`, lines of JSON, in the folder."""

  def written(what: Any, name: str) -> None:
    _ = (
      what
      | f"{name} as JSON" >> beam.Map(json.dumps)
      | f"write {name}" >> beam.io.WriteToText(str(left / name), append_trailing_newlines=True)
    )

  read = p | "logs" >> beam.Create(list(enumerate(logs))) | beam.Reshuffle() | "read logs" >> beam.ParDo(
    _ReadLog(settings)
  ).with_outputs(_ASIDE, main="rows")  # fmt: skip
  counts = read.rows | "magnitudes" >> beam.FlatMap(_magnitude) | beam.combiners.Count.PerElement()
  timed = read.rows | "in seconds" >> beam.ParDo(_InSeconds(), pvalue.AsDict(counts)).with_outputs(_ASIDE, main="rows")
  rows = timed.rows
  if settings.duplicates == "exact":
    with_time = rows | "with a time" >> beam.Filter(lambda row: row.time is not None) | ExactOnce()
    rows = (with_time, rows | "without a time" >> beam.Filter(lambda row: row.time is None)) | beam.Flatten()
  rows = rows | Core(per_user=settings.min_per_user, per_item=settings.min_per_item, rounds=rounds)
  written(rows | "as objects" >> beam.Map(lambda row: row._asdict()), "rows")
  aside = [read[_ASIDE], timed[_ASIDE]]
  if tables:
    records = p | "tables" >> beam.Create(list(enumerate(tables))) | "read tables" >> beam.ParDo(
      _ReadItems(settings)
    ).with_outputs(_ASIDE, main="records")  # fmt: skip
    wanted = rows | "items" >> beam.Map(lambda row: row.item) | beam.Distinct()
    written((wanted, records.records) | JoinItems(), "items")
    aside.append(records[_ASIDE])
  written(tuple(aside) | "all aside" >> beam.Flatten(), "aside")
