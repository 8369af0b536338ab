"""Tables that are lines of text: CSV, TSV and RecBole's atomic files, with the lines that cannot be read set aside."""

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bbqrec_jax.data.preparation.quarantine import Quarantine
from bbqrec_jax.data.preparation.records import LONGEST, read_lines
from bbqrec_jax.data.preparation.table import ROWS, UNREADABLE, Batch, Table, unique_columns
from bbqrec_jax.errors import InputError, shown
from bbqrec_jax.utils.messages import warn

_BLOCK = 2**24  # Bytes of text that are parsed at once; one row is no longer than that.

# A field that begins with a word in double quotes and goes on after it: the quotes are part of the text.
_PLAIN_QUOTE = re.compile(rb'(?:^|\t)"[^"\t\r\n]+"[^"\t\r\n]')

# What a column of a table is called in a file of the kind of RecBole, after its name.
_TYPES = ("token", "token_seq", "float", "float_seq")


def csv_table(path: Path, given: tuple[str, ...]) -> Table:
  """A file as a table; `given` names its columns where its first line does not.

  Raises:
    InputError: if it is none.
  """
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
  unique_columns([_without_type(name) for name in names], where=f"{path} line 1")

  def batches(chosen: Sequence[str], quarantine: Quarantine) -> Iterator[Batch]:
    yield from _read_csv(path, names, [columns[name] for name in chosen], separator, quoted, bool(given), quarantine)

  kinds = {_without_type(name): name.rpartition(":")[2] for name in names}
  sequences, vectors = (
    tuple(name for name, kind in kinds.items() if kind == wanted and columns[name] != name)
    for wanted in ("token_seq", "float_seq")
  )
  return Table(path.name, tuple(columns), batches, path, sequences, vectors)


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
        for first in range(0, len(block), ROWS):
          part = block.slice(first, ROWS)
          yield Batch(
            {_without_type(name): part.column(name) for name in part.schema.names}, rows[first : first + ROWS]
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
