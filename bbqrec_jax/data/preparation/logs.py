"""Logs of interactions: read a batch at a time into numbered users and items and their times."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bbqrec_jax.data.files import LONGEST_LABEL
from bbqrec_jax.data.preparation.columns import LOG, choose, said
from bbqrec_jax.data.preparation.quarantine import Quarantine
from bbqrec_jax.data.preparation.settings import PreparationSettings
from bbqrec_jax.data.preparation.table import Batch, Table, as_text
from bbqrec_jax.data.times import UNITS, magnitude_counts
from bbqrec_jax.errors import InputError

DATE, DAY = -2, -1  # Kinds of times beside the magnitudes of numbers: dates, and numbers such as 20240131.
_FIRST_DATE, _LAST_DATE = -8_520_336_000, 7_258_118_400  # Seconds from 1970 to the years 1700 and 2200.


class Numbering:
  """Numbers texts in the order in which they first come."""

  def __init__(self) -> None:
    """Knows none yet."""
    self.numbers: dict[str, int] = {}

  def encode(self, texts: pa.Array) -> np.ndarray:
    """The numbers [n] int32 of texts [n], new ones among them."""
    encoded, numbers = texts.dictionary_encode(), self.numbers
    own = [numbers.setdefault(one, len(numbers)) for one in encoded.dictionary.to_pylist()]
    return np.array(own, np.int32)[encoded.indices.to_numpy(zero_copy_only=False)]


@dataclasses.dataclass(frozen=True, eq=False)
class Log:
  """What a log holds, in its order.

  Attributes:
    user: [n] int32, of `users`.
    item: [n] int32, of `items`.
    time: [n] float64 seconds; None where the log has none.
    users: ids, in order of first appearance.
    items: ids likewise.
    rows: of the file, all of them.
    left_out: interactions left out for their rating or event.
    unit: that the times came in, "dates", or "" without times.
    columns: what was read as what, in words.
  """

  user: np.ndarray
  item: np.ndarray
  time: np.ndarray | None
  users: list[str]
  items: list[str]
  rows: int
  left_out: int
  unit: str
  columns: str


def log_columns(table: Table, settings: PreparationSettings) -> dict[str, tuple[str, ...]]:
  """Which columns of a log are what, as far as the settings look at them.

  Raises:
    InputError: if one cannot be found.
  """
  asked: dict[str, str | tuple[str, ...]] = {
    "user": settings.user,
    "item": settings.item,
    "time": settings.time,
    "rating": settings.rating,
    "event": settings.event,
  }
  chosen = choose(table.columns, LOG, asked, ("user", "item"), where=table.name)
  if settings.min_rating > float("-inf") and "rating" not in chosen:
    raise InputError(f"{table.name}: expected a column with ratings for --min_rating; say it with --rating=COLUMN")
  if settings.min_rating == float("-inf") and not settings.rating:
    chosen.pop("rating", None)
  if not settings.events:
    chosen.pop("event", None)
  elif "event" not in chosen:
    raise InputError(f"{table.name}: expected a column with kinds of events for --events; say it with --event=COLUMN")
  return chosen


def read_log(table: Table, settings: PreparationSettings, quarantine: Quarantine) -> Log:
  """Reads a log; rows that cannot be used go into quarantine.

  Args:
    table: the log.
    settings: which columns are what, and the lowest rating.
    quarantine: for rows without a user, an item or a time, or with one that is none.

  Raises:
    InputError: if a column cannot be found, the file cannot be read, or too many of its rows cannot be used.
  """
  chosen = log_columns(table, settings)
  names = {kind: columns[0] for kind, columns in chosen.items()}
  users, items = Numbering(), Numbering()
  parts: list[tuple[np.ndarray, ...]] = []
  rows = low = 0
  for batch in table.batches(tuple(names.values()), quarantine):
    part = usable_rows(table.name, batch, names, settings, quarantine)
    rows += len(part.row) + part.left_out
    low += part.left_out
    parts.append((users.encode(part.user), items.encode(part.item), part.time, part.is_date, part.row))
  rows += sum(quarantine.of(table.name).values())
  user, item, time, is_date, row = (
    np.concatenate(pieces) for pieces in (zip(*parts, strict=True) if parts else [[np.zeros(0)]] * 5)
  )
  unit = ""
  if "time" in names:
    usable, time, unit = _in_seconds(table.name, time, is_date.astype(bool), row, quarantine)
    if not usable.all():
      user, item, time = user[usable], item[usable], time[usable]
  quarantine.check(table.name, rows=rows, most=settings.max_bad)
  if not len(user):
    why = f", {low} of them left out for their rating or event" if low else ""
    raise InputError(f"{table.name}: expected interactions, found none to use in {rows} rows{why}; check the file")
  return Log(
    user=user.astype(np.int32),
    item=item.astype(np.int32),
    time=time if unit else None,
    users=list(users.numbers),
    items=list(items.numbers),
    rows=rows,
    left_out=low,
    unit=unit,
    columns=said(chosen, table.columns),
  )


class Rows(NamedTuple):
  """The usable rows of a batch.

  Attributes:
    user: [n] strings.
    item: [n] strings.
    time: [n] float64, as they stand; zeros where the log has none.
    is_date: [n] bool, which times were dates, and are seconds.
    row: [n] int64, their numbers in the file.
    left_out: rows that could be used, and were not to be.
  """

  user: pa.Array
  item: pa.Array
  time: np.ndarray
  is_date: np.ndarray
  row: np.ndarray
  left_out: int


def usable_rows(
  file: str, batch: Batch, names: dict[str, str], settings: PreparationSettings, quarantine: Quarantine
) -> Rows:
  """The usable rows of a batch of a log; the others go into quarantine.

  Args:
    file: its name.
    batch: some of its rows.
    names: of the columns, by what they are.
    settings: the lowest rating, the events, and how dates are written.
    quarantine: gets the other rows.
  """
  usable = np.ones(len(batch.rows), bool)

  def aside(wrong: np.ndarray, reason: str, values: pa.Array) -> None:
    for place in np.flatnonzero(wrong & usable):
      text = values[place].as_py()
      for line in (text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)).splitlines() or [""]:
        quarantine.add(file, batch.rows[place], reason, line)  # Several lines, where a double quote is not closed.
    usable[wrong] = False

  texts = {}
  for kind in ("user", "item"):
    texts[kind], wrong = as_text(batch.columns[names[kind]])
    for faulty, reason in wrong_ids(texts[kind], wrong, f"{kind} id"):
      aside(faulty, reason, batch.columns[names[kind]])
  time, is_date = np.zeros(len(usable)), np.zeros(len(usable), bool)
  if "time" in names:
    time, is_date = read_times(batch.columns[names["time"]], settings.time_format)
    form, given = settings.time_format or "ISO; --time_format reads others", batch.columns[names["time"]]
    aside(~np.isfinite(time), f"a time that is neither a number nor a date ({form})", given)
    aside(is_date & ((time < _FIRST_DATE) | (time > _LAST_DATE)), "a date before 1700 or after 2200", given)
  low = 0
  if "rating" in names:
    rating = _numbers(batch.columns[names["rating"]])
    aside(~np.isfinite(rating), "a rating that is no number", batch.columns[names["rating"]])
    below = usable & (rating < settings.min_rating)
    low = int(below.sum())
    usable &= ~below
  if "event" in names:
    texts["event"], _ = as_text(batch.columns[names["event"]])
    other = usable & ~_numpy(pc.is_in(texts["event"], pa.array(settings.events)))
    low += int(other.sum())
    usable &= ~other
  mask = pa.array(usable)
  user, item = texts["user"].filter(mask), texts["item"].filter(mask)
  return Rows(user, item, time[usable], is_date[usable], batch.rows[usable], low)


def wrong_ids(texts: pa.Array, not_utf8: np.ndarray, what: str) -> Iterator[tuple[np.ndarray, str]]:
  """What is wrong with ids: bool [n] and the reason, of each reason.

  Args:
    texts: [n] strings.
    not_utf8: bool [n].
    what: they are.
  """
  yield not_utf8, f"bytes that are no UTF-8 as the {what}"
  yield _numpy(pc.equal(texts, "")), f"no {what}"
  yield _numpy(pc.greater(pc.binary_length(texts), LONGEST_LABEL)), f"more than {LONGEST_LABEL} bytes as the {what}"
  yield (
    _numpy(pc.match_substring_regex(texts, r"[\x00-\x1f\x7f]")),
    f"a control character, or bytes that are no UTF-8, in the {what}",
  )


def _numpy(array: pa.Array) -> np.ndarray:
  return array.to_numpy(zero_copy_only=False).astype(bool)


def _numbers(array: pa.Array) -> np.ndarray:
  """Numbers [n] float64; NaN for what is none."""
  if pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
    return array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)  # Past 2^53 the nearest.
  texts, _ = as_text(array)
  texts = pc.if_else(pc.equal(texts, ""), None, texts)
  try:
    return texts.cast(pa.float64()).to_numpy(zero_copy_only=False)
  except pa.ArrowInvalid:
    plain = pc.match_substring_regex(texts, r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$")
    return pc.if_else(plain, texts, None).cast(pa.float64()).to_numpy(zero_copy_only=False)


def read_times(array: pa.Array, form: str = "") -> tuple[np.ndarray, np.ndarray]:
  """Times [n] float64 as they stand, NaN for what is none; and bool [n], which were dates and are seconds since 1970.

  Args:
    array: [n] of numbers, dates or text.
    form: how dates are written, as `strptime` reads it; "" is ISO.
  """
  kind = array.type
  if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
    micros = array.cast(pa.timestamp("us", getattr(kind, "tz", None)), safe=False).cast(pa.int64())
    values = micros.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False) / 1e6
    return values, np.ones(len(array), bool)
  values = np.full(len(array), np.nan) if form else _numbers(array)
  is_date = np.isnan(values)
  if is_date.any() and not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
    texts, _ = as_text(array)
    left = texts.filter(pa.array(is_date))
    values = values.copy()  # What Arrow gives may be read-only.
    values[is_date] = _dates(left, form)
  return values, is_date


def _dates(texts: pa.Array, form: str) -> np.ndarray:
  """Seconds since 1970 [n] float64 of dates; NaN for what is none. Without a time zone they are taken for UTC."""
  if form:
    try:
      parsed = pc.strptime(texts, format=form, unit="us", error_is_null=True)
    except pa.ArrowException as error:
      raise InputError(f"--time_format={form}: expected a format as %d/%m/%Y, got one that is none ({error})") from None
  else:
    texts = pc.replace_substring_regex(texts, r"^(.{19}[.][0-9]{6})[0-9]{1,3}", r"\1")  # No nanoseconds.
    texts = pc.replace_substring_regex(texts, " ?(UTC|GMT)$", "Z")
    shape = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}([ T][0-9]{2}:[0-9]{2}(:[0-9]{2}([.][0-9]{1,6})?)?)?"
    ends = {"": "$", "zone": r"(Z|[+-][0-9]{2}(:?[0-9]{2})?)$"}
    parsed = pa.nulls(len(texts), pa.timestamp("us"))
    for end in ends:
      fits = pc.match_substring_regex(texts, shape + ends[end])
      chosen = pc.if_else(fits, texts, None)
      one = _cast_dates(chosen, "UTC" if end else None)
      parsed = pc.coalesce(parsed, one)
  return parsed.cast(pa.int64()).cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False) / 1e6


def _cast_dates(texts: pa.Array, zone: str | None) -> pa.Array:
  """Dates [n] of texts of the right shape; null for a thirteenth month."""
  try:
    parsed = texts.cast(pa.timestamp("us", zone))
  except pa.ArrowInvalid:
    found = []
    for text in texts.to_pylist():
      try:
        found.append(None if text is None else pa.scalar(text).cast(pa.timestamp("us", zone)).cast(pa.int64()).as_py())
      except pa.ArrowInvalid:
        found.append(None)
    parsed = pa.array(found, pa.int64())
  return parsed.cast(pa.int64()).cast(pa.timestamp("us"))


def kinds_of(time: np.ndarray, is_date: np.ndarray) -> np.ndarray:
  """What kinds of times there are, [n] int: `DATE`, `DAY`, or the magnitude of a number.

  Args:
    time: [n] float64, as they stand.
    is_date: [n] bool.
  """
  magnitudes, _ = magnitude_counts(time)
  return np.where(is_date, DATE, np.where(np.isfinite(_days(time)), DAY, magnitudes))


def usual_kind(counts: Mapping[int, int]) -> int:
  """The kind of most times that are no dates, `DATE` if all are; too few of `DAY` are numbers like others.

  Args:
    counts: how many there are of each kind.
  """
  numbers = Counter({kind: count for kind, count in counts.items() if kind != DATE})
  days = numbers.pop(DAY, 0)
  if days > numbers.total():
    return DAY
  numbers[0] += days
  return min(numbers, key=lambda kind: (-numbers[kind], kind)) if numbers.total() else DATE


def seconds_of(time: np.ndarray, kinds: np.ndarray, usual: int) -> np.ndarray:
  """Times [n] float64 in seconds; NaN for numbers that are not of the usual kind, where that tells a unit."""
  if usual == DAY:
    numbers = _days(time)
  else:
    numbers = np.where(kinds == usual, time / UNITS[_unit(usual)], np.nan) if usual > 0 else time
  return np.where(kinds == DATE, time, numbers)


def odd_time(usual: int) -> str:
  """The reason why a time that is not of the usual kind cannot be used."""
  return f"a time that is not of most times' magnitude ({_unit(usual)})"


def units_in_words(counts: Mapping[int, int]) -> str:
  """What the times of a log are, by how many there are of each kind."""
  usual = usual_kind(counts)
  units = {DATE: [], DAY: [_unit(DAY)], 0: ["numbers, taken for seconds"]}.get(usual, [f"{_unit(usual)} since 1970"])
  return " and ".join(units + ["dates, UTC unless they say otherwise"] * bool(counts.get(DATE)))


def _unit(kind: int) -> str:
  return "days written as 20240131" if kind == DAY else dict(enumerate(UNITS, start=1)).get(kind, "seconds")


def _days(time: np.ndarray) -> np.ndarray:
  """Seconds since 1970 [n] of days from 1900 to 2100 that are written as 20240131; NaN for other numbers."""
  whole = (time >= 19000101) & (time <= 21001231) & (time == np.floor(time))
  number = np.where(whole, time, 19000101).astype(np.int64)
  months = (number // 10000 - 1970) * 12 + number // 100 % 100 - 1
  day = months.astype("datetime64[M]").astype("datetime64[D]") + (number % 100 - 1)
  back = day.astype("datetime64[M]").astype(np.int64)
  there = whole & (back == months) & (number // 100 % 100 >= 1) & (number // 100 % 100 <= 12)
  return np.where(there, 86400.0 * day.astype(np.int64), np.nan)


def _in_seconds(
  file: str, time: np.ndarray, is_date: np.ndarray, row: np.ndarray, quarantine: Quarantine
) -> tuple[np.ndarray, np.ndarray, str]:
  """(which times are usable, times in seconds, their unit in words): those of another unit than most go aside."""
  kinds = kinds_of(time, is_date)
  counts = Counter(kinds.tolist())
  usual = usual_kind(counts)
  seconds = seconds_of(time, kinds, usual)
  usable = np.isfinite(seconds)
  for place in np.flatnonzero(~usable):
    quarantine.add(file, row[place], odd_time(usual), f"{time[place]:.15g}")
  return usable, seconds, units_in_words(counts)
