"""What `prepare_with_beam` is made of, for Apache Beam: reading logs and item tables, duplicates, the k-core, joins."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam import pvalue

from bbqrec_jax.data.preparation.items import KNOWN, Pictures, has_required, item_columns, read_item, wanted_columns
from bbqrec_jax.data.preparation.logs import kinds_of, log_columns, odd_time, seconds_of, usable_rows, usual_kind
from bbqrec_jax.data.preparation.quarantine import Quarantine
from bbqrec_jax.data.preparation.settings import PreparationSettings
from bbqrec_jax.data.preparation.tables import open_table
from bbqrec_jax.errors import InputError

ASIDE, COUNTS, UNUSED = "aside", "counts", "unused"  # What there is beside the rows and items.


class Row(NamedTuple):
  """An interaction: ids, its second (None without times), and where it stands, by which everything is ordered."""

  user: str
  item: str
  time: float | None
  place: tuple[int, int]  # The number of the file, and of the row in it.


class Collected(Quarantine):
  """Rows that cannot be used, held to be passed on."""

  def __init__(self) -> None:
    """Holds none yet."""
    super().__init__(Path())
    self.rows: list[dict[str, Any]] = []
    self.total = 0

  def add(self, file: str, row: int, reason: str, text: object) -> None:
    """See `Quarantine`."""
    self.rows.append({"file": file, "row": int(row), "reason": reason, "text": str(text)[:1000]})
    self.total += 1

  def passed_on(self) -> Iterator[pvalue.TaggedOutput]:
    """The rows, which are no longer held then."""
    rows, self.rows = self.rows, []
    yield from (pvalue.TaggedOutput(ASIDE, row) for row in rows)


class ReadLog(beam.DoFn):
  """(number, path) of a log -> (user, item, time as it stands or None, whether a date, place) of its usable rows."""

  def __init__(self, settings: PreparationSettings):
    """Takes which columns are what, and what is left out."""
    self._settings = settings

  def process(self, element: tuple[int, str]) -> Iterator[Any]:
    """See the class."""
    number, path = element
    table = open_table(path, what="log", columns=self._settings.columns)
    names = {kind: columns[0] for kind, columns in log_columns(table, self._settings).items()}
    rows, left_out, aside = 0, 0, Collected()
    for batch in table.batches(tuple(names.values()), aside):
      part = usable_rows(table.name, batch, names, self._settings, aside)
      times: Iterable[Any] = part.time.tolist() if "time" in names else [None] * len(part.row)
      columns = part.user.to_pylist(), part.item.to_pylist(), times, part.is_date.tolist(), part.row.tolist()
      for user, item, time, is_date, row in zip(*columns, strict=True):
        yield user, item, time, is_date, (number, row)
      rows, left_out = rows + len(part.row) + part.left_out, left_out + part.left_out
      yield from aside.passed_on()
    yield from aside.passed_on()
    yield pvalue.TaggedOutput(COUNTS, {"file": table.name, "rows": rows + aside.total, "left_out": left_out})


def kinds_in(element: tuple[Any, ...]) -> Iterator[int]:
  """The kind of the time of what `ReadLog` gives, if it has one."""
  _, _, time, is_date, _ = element
  if time is not None:
    yield int(kinds_of(np.array([time]), np.array([is_date]))[0])


class InSeconds(beam.DoFn):
  """What `ReadLog` gives -> `Row`, its time in seconds, those of another unit than most set aside."""

  def __init__(self, files: Sequence[str]):
    """Takes the names of the files."""
    self._files = files

  def process(self, element: tuple[Any, ...], counts: dict[int, int]) -> Iterator[Any]:
    """See the class."""
    user, item, time, is_date, place = element
    second = time
    if time is not None:
      usual, one = usual_kind(counts), np.array([time])
      second = float(seconds_of(one, kinds_of(one, np.array([is_date])), usual)[0])
      if np.isnan(second):
        held = Collected()
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


class OncePerItem(beam.PTransform):
  """Of rows of the same user and item only the first, or the last, in time order."""

  def __init__(self, *, last: bool):
    """Says which."""
    super().__init__()
    self._choose = max if last else min

  def expand(self, rows: Any) -> Any:
    """See the class."""
    return (
      rows
      | "by user and item" >> beam.Map(lambda row: ((row.user, row.item), (row.time, row.place)))
      | "one of them" >> beam.CombinePerKey(self._choose)
      | "as rows again" >> beam.Map(lambda pair: Row(*pair[0], *pair[1]))
    )


class OfUsableItems(beam.PTransform):
  """(rows, (id, (place, whether it has what is required)) of the item table) -> the rows of items that have it.

  An item that the table has twice is what it is first; one that it lacks has nothing.
  """

  def expand(self, both: Any) -> Any:
    """See the class."""
    rows, items = both

    def usable(group: tuple[str, dict[str, Iterable[Any]]]) -> Iterable[Row]:
      _, found = group
      return found["rows"] if any(found["usable"]) else ()

    first = items | "first of each" >> beam.CombinePerKey(min) | "whether" >> beam.MapTuple(
      lambda item, one: (item, one[1])
    )  # fmt: skip
    return (
      {"rows": rows | "by item" >> beam.Map(lambda row: (row.item, row)), "usable": first}
      | beam.CoGroupByKey()
      | beam.FlatMap(usable).with_output_types(Row)
    )


class HasRequired(beam.DoFn):
  """What `ReadItems` gives -> (id, (place, whether it has what is required))."""

  def __init__(self, require: Sequence[str], images: str | None):
    """Takes what is required, and the folder of pictures, if there is one."""
    self._require, self._images = require, images

  def setup(self) -> None:
    """Looks at the pictures."""
    self._pictures = None if self._images is None else Pictures(Path(self._images))

  def process(self, element: tuple[str, tuple[Any, dict[str, Any], str]]) -> Iterator[Any]:
    """See the class."""
    item, (place, record, _) = element
    yield item, (place, has_required(record, self._pictures, self._require))


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


class ReadItems(beam.DoFn):
  """(number, path) of an item table -> (id, (place, the object that items.jsonl holds, the file's name))."""

  def __init__(self, settings: PreparationSettings):
    """Takes which columns are what."""
    self._settings = settings

  def process(self, element: tuple[int, str]) -> Iterator[Any]:
    """See the class."""
    number, path = element
    table = open_table(path, what="item table")
    chosen = item_columns(table, self._settings)
    rows, aside = 0, Collected()
    for batch in table.batches(wanted_columns(chosen), aside):
      for row, record in read_item(table, batch, chosen, aside):
        rows += 1
        yield record["id"], ((number, row), record, table.name)
      yield from aside.passed_on()
    yield from aside.passed_on()
    yield pvalue.TaggedOutput(COUNTS, {"file": table.name, "rows": rows + aside.total, "left_out": 0})


class JoinItems(beam.PTransform):
  """(ids that are wanted, (id, (place, record, file))) -> (place, record) of those wanted, the first of each.

  Beside them, tagged, rows with an id that came before, and the ids that nobody wants.
  """

  def expand(self, both: Any) -> Any:
    """See the class."""
    wanted, records = both

    def first(group: tuple[str, dict[str, Iterable[Any]]]) -> Iterator[Any]:
      item, found = group
      aside = Collected()
      for number, (place, record, file) in enumerate(sorted(found["records"], key=lambda one: one[0])):
        if number:
          aside.add(file, place[1], KNOWN, item)
        elif any(True for _ in found["wanted"]):
          yield place, record
        else:
          yield pvalue.TaggedOutput(UNUSED, item)
      yield from aside.passed_on()

    return (
      {"wanted": wanted | beam.Map(lambda item: (item, True)), "records": records}
      | beam.CoGroupByKey()
      | beam.FlatMap(first).with_outputs(ASIDE, UNUSED, main="items")
    )
