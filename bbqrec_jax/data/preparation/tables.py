"""Tables of any kind, read a batch of rows at a time, with the rows that cannot be read set aside.

CSV and TSV, Parquet, JSON lines, RecBole's atomic files, and tables in memory (pandas, polars, pyarrow, dictionaries).
"""

import codecs
import gzip
import io
import itertools
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bbqrec_jax.data.preparation.quarantine import Quarantine
from bbqrec_jax.data.preparation.records import LONGEST, flat_text, read_lines, read_records
from bbqrec_jax.errors import InputError, shown
from bbqrec_jax.utils.files import check_file
from bbqrec_jax.utils.messages import warn

_ROWS = 2**16  # Of a batch.
_BLOCK = 2**24  # Bytes of text that are parsed at once; one row is no longer than that.
_LOOKED_AT = 1000  # Objects whose names are the columns of a log of them; each has what a log needs.
_MOST_COLUMNS = 1000

# A field that begins with a word in double quotes and goes on after it: the quotes are part of the text.
_PLAIN_QUOTE = re.compile(rb'(?:^|\t)"[^"\t\r\n]+"[^"\t\r\n]')

UNREADABLE = "\x1a"  # What stands for a byte that is no UTF-8; the sign that Unicode calls a substitute.

# What a column of a table is called in a file of the kind of RecBole, after its name.
_TYPES = ("token", "token_seq", "float", "float_seq")


class Batch(NamedTuple):
  """Some rows of a table.

  Attributes:
    columns: the chosen ones by name, [n] each.
    rows: [n] int64, their numbers in the file; the header of one that has it is row 1.
  """

  columns: dict[str, pa.Array]
  rows: np.ndarray


class Table(NamedTuple):
  """A table that can be read from its beginning, as often as is needed.

  Attributes:
    name: what to call it in messages.
    columns: all of them.
    batches: (some of the columns, where bad rows go) -> their rows, in order.
  """

  name: str
  columns: tuple[str, ...]
  batches: Callable[[Sequence[str], Quarantine], Iterator[Batch]]


def open_table(source: Any, *, what: str, columns: Sequence[str] = ()) -> Table:
  """A table from a file or from memory.

  Args:
    source: a path, or what gives its columns by name.
    what: to call it in messages if it is in memory.
    columns: the names of a CSV file's columns, where its first line is no header.

  Raises:
    InputError: if it is no table.
  """
  if not isinstance(source, str | Path):
    return _memory_table(source, what)
  path = Path(source)
  check_file(path, what=f"a file, the {what}")
  name = path.name.lower().removesuffix(".gz")
  if name.endswith((".parquet", ".pq")):
    return _parquet_table(path)
  if name.endswith((".jsonl", ".ndjson", ".json")):
    return _json_table(path, _LOOKED_AT if what == "log" else None)
  if name.endswith((".csv", ".tsv", ".txt", ".tab", ".inter", ".item", ".data", ".dat")):
    return _csv_table(path, tuple(columns))
  raise InputError(
    f"{path}: expected the {what} as .csv, .tsv, .parquet or .jsonl (or .inter, .item of RecBole), plain or .gz, got"
    " another ending; rename the file, or write it as one of them"
  )


def _unique(columns: Sequence[str], *, where: str) -> tuple[str, ...]:
  """The columns, which must be there once each.

  Raises:
    InputError: if one is not, or there are too many.
  """
  if len(columns) > _MOST_COLUMNS:
    raise InputError(f"{where}: expected at most {_MOST_COLUMNS} columns, got {len(columns)}; leave some out")
  twice = [name for name in columns if list(columns).count(name) > 1]
  if twice:
    raise InputError(f"{where}: expected each column once, got {shown(twice[0])} again; rename one")
  return tuple(columns)


def _csv_table(path: Path, given: tuple[str, ...]) -> Table:
  first = next(read_lines(path), b"").rstrip(b"\r\n")
  try:
    header = first.decode()
  except UnicodeDecodeError:
    raise InputError(f"{path} line 1: expected UTF-8 text, got {shown(first)}; save the file as UTF-8") from None
  if not header.strip() or "\0" in header:
    came = "zero bytes, as of UTF-16" if header.strip() else "an empty line"
    raise InputError(f"{path} line 1: expected the names of the columns, got {came}; save a table as UTF-8 text")
  tabs = path.name.removesuffix(".gz").endswith((".tsv", ".tab", ".inter", ".item"))
  separator = "\t" if tabs else max(",\t;|", key=header.count)
  if "::" in header and separator not in header:
    raise InputError(
      f"{path} line 1: expected columns between commas, tabs, semicolons or |, got {shown(header)}, with :: between"
      f" them; write it anew, as by sed 's/::/\\t/g' {path.name} > {path.stem}.tsv"
    )
  atomic = path.name.removesuffix(".gz").endswith((".inter", ".item"))
  quoted = not atomic and not (separator == "\t" and any(map(_PLAIN_QUOTE.search, read_lines(path))))
  names = given or tuple(_split(header, separator, quoted=quoted, where=f"{path} line 1"))
  found = len(_split(header, separator, quoted=quoted, where=f"{path} line 1"))
  if given and len(given) != found:
    raise InputError(f"{path} line 1: expected the {len(given)} columns of --columns, got {found}; name them all")
  columns = {_without_type(name): name for name in names}
  _unique([_without_type(name) for name in names], where=f"{path} line 1")

  def batches(chosen: Sequence[str], quarantine: Quarantine) -> Iterator[Batch]:
    yield from _read_csv(path, names, [columns[name] for name in chosen], separator, quoted, bool(given), quarantine)

  return Table(path.name, tuple(columns), batches)


def _split(header: str, separator: str, *, quoted: bool, where: str) -> list[str]:
  """The fields of the first line."""
  import csv

  try:
    (fields,) = csv.reader([header], delimiter=separator, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
  except (csv.Error, ValueError) as error:
    raise InputError(f"{where}: expected the names of the columns, got {shown(header)} ({error})") from None
  return [field.strip() for field in fields]


def _without_type(name: str) -> str:
  """The name of a column that RecBole writes as name:type."""
  stem, _, kind = name.rpartition(":")
  return stem if stem and kind in _TYPES else name


def _substitute(error: UnicodeError) -> tuple[str, int]:
  """`UNREADABLE` for each byte that is no UTF-8: the text keeps its length."""
  assert isinstance(error, UnicodeDecodeError)
  return UNREADABLE * (error.end - error.start), error.end


codecs.register_error("bbqrec_substitute", _substitute)


class _Counted(io.RawIOBase):
  """A stream of text that counts its double quotes, and its lines that are not blank, as they are read.

  It is UTF-8 whatever the file is: pyarrow reports a bad row only if its text can be decoded.
  """

  def __init__(self, inner: Any):
    self._inner = inner
    self.quotes = self.lines = 0
    self.unreadable = self.first_unreadable = 0  # Bytes that are no UTF-8, and the line of the first.
    self._ends = 0  # Lines so far.
    self._length, self._last = 0, -1  # Bytes so far, and where the last line ended.
    self._open = b""  # The beginning of what may be a blank line, "" or a carriage return.
    self._held = b""  # The beginning of a character.

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    piece = b""
    while not piece:
      new = self._inner.read(max(1, len(buffer) - len(self._held)))
      held = self._held + new
      if not held:
        return 0
      text, used = codecs.utf_8_decode(held, "bbqrec_substitute", not new)
      piece, self._held = text.encode(), held[used:]
    count, substitutes = len(piece), piece.count(UNREADABLE.encode()) - held[:used].count(UNREADABLE.encode())
    if substitutes and not self.unreadable:
      self.first_unreadable = 1 + self._ends + piece[: piece.index(UNREADABLE.encode())].count(b"\n")
    self.unreadable += substitutes
    memoryview(buffer)[:count] = piece
    self.quotes += piece.count(b'"')
    ends = np.flatnonzero(np.frombuffer(piece, np.uint8) == ord("\n"))
    self._ends += len(ends)
    lengths = np.diff(ends, prepend=self._last - self._length) - 1
    blank = lengths == 0
    before = [piece[end - 1 : end] if end else self._open[-1:] for end in ends[lengths == 1].tolist()]
    blank[lengths == 1] = [sign == b"\r" for sign in before]
    self.lines += int(np.sum(~blank))
    if len(ends):
      self._last = self._length + int(ends[-1])
    self._length += count
    self._open = (self._open + piece)[-1:]
    return count

  @property
  def total(self) -> int:
    """Lines that are not blank, the last one without an end among them."""
    return self.lines + (self._length - 1 > self._last and self._open not in (b"", b"\r", b"\n"))


def _read_csv(
  path: Path,
  names: Sequence[str],
  chosen: Sequence[str],
  separator: str,
  quoted: bool,
  headless: bool,
  quarantine: Quarantine,
) -> Iterator[Batch]:
  import pyarrow.csv

  bad: list[int] = []  # Rows that were skipped; the others' numbers follow from them.
  bad_lines = good = 0

  def skip(row: Any) -> str:
    nonlocal bad_lines
    bad.append(row.number)
    reason = f"{row.actual_columns} fields where the header has {row.expected_columns}"
    for line in list(filter(str.strip, row.text.split("\n"))) or [""]:  # Several, where a double quote is not closed.
      quarantine.add(path.name, row.number, reason, line)
      bad_lines += 1
    return "skip"

  parse = pyarrow.csv.ParseOptions(
    delimiter=separator,
    quote_char='"' if quoted else False,
    newlines_in_values=quoted,
    invalid_row_handler=skip,
  )
  read = pyarrow.csv.ReadOptions(
    use_threads=False, block_size=_BLOCK, column_names=list(names), skip_rows=0 if headless else 1
  )
  convert = pyarrow.csv.ConvertOptions(
    column_types=dict.fromkeys(names, pa.binary()), include_columns=list(dict.fromkeys(chosen))
  )
  with path.open("rb") as raw:
    compressed = raw.read(2) == b"\x1f\x8b"
  number = 1 if headless else 2
  try:
    with gzip.open(path) if compressed else path.open("rb") as stream:
      if stream.read(3) != b"\xef\xbb\xbf":
        stream.seek(0)
      counted = _Counted(stream)
      reader = pyarrow.csv.open_csv(counted, read_options=read, parse_options=parse, convert_options=convert)
      done = 0
      while True:
        try:
          block = reader.read_next_batch()
        except StopIteration:
          break
        rows = np.arange(number, number + len(block))
        # Every bad row before a good one moves it on by one.
        while done < len(bad) and len(rows) and bad[done] <= rows[-1]:
          rows[np.searchsorted(rows, bad[done]) :] += 1
          done += 1
        good += len(rows)
        if len(rows):
          number = int(rows[-1]) + 1
        for first in range(0, len(block), _ROWS):
          part = block.slice(first, _ROWS)
          yield Batch(
            {_without_type(name): part.column(name) for name in part.schema.names}, rows[first : first + _ROWS]
          )
      if counted.unreadable:
        warn(
          f"{path}: expected UTF-8 text, got {counted.unreadable:,} bytes that are none, the first in line"
          f" {counted.first_unreadable}; write it anew, as by iconv -f CP1252 -t UTF-8 {path.name}"
        )
      swallowed = counted.total - (not headless) - good - bad_lines
      if counted.quotes % 2 and swallowed > 0:
        raise InputError(
          f"{path}: expected every double quote to be closed, got {counted.quotes} of them, and {swallowed} lines that"
          " are within one; close it, or double those that are meant"
        )
  except InputError:
    raise
  except (pa.ArrowInvalid, UnicodeDecodeError, EOFError, zlib.error, OSError) as error:
    if "Empty CSV file" in str(error):
      return
    if isinstance(error, EOFError | zlib.error | OSError) and not isinstance(error, pa.ArrowInvalid):
      raise InputError(f"{path}: expected a table of text, got corrupt or cut-off gzip; copy it again") from None
    raise InputError(
      f"{path}: expected a table of text, could not read on ({' '.join(str(error).split())[:200]}); a double quote that"
      f" is not closed, or a row of more than {LONGEST} bytes, does so; correct it"
    ) from None


def _parquet_table(path: Path) -> Table:
  import pyarrow.parquet

  def refuse(error: Exception) -> InputError:
    return InputError(f"{path}: expected a Parquet file, could not read one ({error}); write it again")

  try:
    columns = tuple(pyarrow.parquet.ParquetFile(path).schema_arrow.names)
  except (pa.ArrowException, OSError, ValueError) as error:
    raise refuse(error) from None

  def batches(chosen: Sequence[str], quarantine: Quarantine) -> Iterator[Batch]:
    del quarantine
    try:
      first = 1
      for block in pyarrow.parquet.ParquetFile(path).iter_batches(_ROWS, columns=list(dict.fromkeys(chosen))):
        yield Batch(dict(zip(block.schema.names, block.columns, strict=True)), np.arange(first, first + len(block)))
        first += len(block)
    except (pa.ArrowException, OSError, ValueError) as error:
      if isinstance(error, InputError):
        raise
      raise refuse(error) from None

  return Table(path.name, _unique(columns, where=str(path)), batches)


def _json_table(path: Path, looked_at: int | None) -> Table:
  names: dict[str, None] = {}
  for record in itertools.islice(read_records(path), looked_at):
    names |= dict.fromkeys(record.value or ())
  if not names:
    raise InputError(f"{path}: expected JSON objects with names, one a line, found none; give a file of them")

  def batches(chosen: Sequence[str], quarantine: Quarantine) -> Iterator[Batch]:
    records = read_records(path)
    while block := list(itertools.islice(records, _ROWS)):
      whole = []
      for record in block:
        if record.value is None:
          quarantine.add(path.name, record.row, "no JSON object", record.text)
        else:
          whole.append(record)
      values = [[record.value.get(name) for record in whole if record.value is not None] for name in chosen]
      yield Batch(
        {name: pa.array(map(_one_text, column), pa.string()) for name, column in zip(chosen, values, strict=True)},
        np.array([record.row for record in whole], np.int64),
      )

  return Table(path.name, _unique(tuple(names), where=str(path)), batches)


def _one_text(value: Any) -> str | None:
  """A JSON value as text; "" for half a character, which no text may hold."""
  if value is None or value != value:
    return None
  if isinstance(value, str):
    return value if value.isascii() else value.encode("utf-8", "replace").decode()
  if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
    return str(int(value))
  return flat_text(value, joiner=" > ") if isinstance(value, list | dict) else str(value)


def _memory_table(source: Any, what: str) -> Table:
  try:
    source = source.collect() if hasattr(source, "collect") else source  # A LazyFrame of polars.
    if isinstance(source, pa.Table):
      table = source
    elif isinstance(source, dict):
      table = pa.table({name: _array(values) for name, values in source.items()})
    elif hasattr(source, "__arrow_c_stream__"):  # pandas, polars.
      try:
        table = pa.table(source)
      except (pa.ArrowInvalid, pa.ArrowTypeError):  # pandas' objects of several kinds in one column.
        mixed = source.select_dtypes(object)
        table = pa.table(source.assign(**{name: mixed[name].map(_one_text, na_action="ignore") for name in mixed}))
    else:
      table = pa.Table.from_pandas(source, preserve_index=False)
  except Exception as error:  # Whatever a library makes of columns that are none.
    raise InputError(f"{what}: expected a path or a table (pandas, polars, pyarrow, dictionary), got {error}") from None

  def batches(chosen: Sequence[str], quarantine: Quarantine) -> Iterator[Batch]:
    del quarantine
    first = 0
    for block in table.select(list(dict.fromkeys(chosen))).to_batches(_ROWS):
      yield Batch(dict(zip(block.schema.names, block.columns, strict=True)), np.arange(first, first + len(block)))
      first += len(block)

  return Table(what, _unique(tuple(table.column_names), where=what), batches)


def _array(values: Any) -> pa.Array:
  try:
    return pa.array(values, from_pandas=True)
  except (pa.ArrowInvalid, pa.ArrowTypeError):  # Of several kinds.
    return pa.array([_one_text(value) for value in values], pa.string())


def as_text(array: pa.Array) -> tuple[pa.Array, np.ndarray]:
  """A column as text without blanks around it.

  Args:
    array: [n] of any type.

  Returns:
    [n] strings, "" where there is nothing; and bool [n], which hold bytes that are no UTF-8.
  """
  wrong = np.zeros(len(array), bool)
  if pa.types.is_dictionary(array.type):  # Some kinds of text cannot be decoded as they are.
    array = pa.DictionaryArray.from_arrays(array.indices, as_text(array.dictionary)[0]).dictionary_decode()
  kind = array.type
  if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
    try:
      array = array.cast(pa.string())
    except pa.ArrowInvalid:
      values = array.to_pylist()
      array = pa.array([None if value is None else value.decode("utf-8", "replace") for value in values], pa.string())
      wrong = np.array([_is_bad(value) for value in values], bool)
  elif pa.types.is_floating(kind):
    numbers = array.to_numpy(zero_copy_only=False)
    whole = np.isfinite(numbers) & (np.abs(numbers) < 2**53) & (numbers == np.round(np.nan_to_num(numbers)))
    if np.all(whole | np.isnan(numbers)):
      array = pc.cast(pc.if_else(pa.array(whole), array, None), pa.int64())
    array = array.cast(pa.string())
  elif pa.types.is_nested(kind):
    array = pa.array([_one_text(value) for value in array.to_pylist()], pa.string())
  elif not pa.types.is_string(kind):
    array = array.cast(pa.string())
  return pc.utf8_trim_whitespace(pc.fill_null(array, "")), wrong


def _is_bad(value: bytes | None) -> bool:
  try:
    (value or b"").decode()
  except UnicodeDecodeError:
    return True
  return False
