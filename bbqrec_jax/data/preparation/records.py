"""Files of objects, as published dumps have them: JSON or Python literals, one a line or spread over many lines."""

import ast
import gzip
import json
import re
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.files import check_file

# Bytes that one object may take; a gzip bomb, or a file of another kind, is not read to its end as one line.
LONGEST = 2**24

# Nested lists and objects; deeper ones are refused rather than followed.
_DEEPEST = 50

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'')


class Record(NamedTuple):
  """One object of a file.

  Attributes:
    row: the line that it begins on, from 1.
    value: the object; None where the text is none.
    text: what could not be read.
  """

  row: int
  value: dict[str, Any] | None
  text: str = ""


def read_lines(path: Path) -> Iterator[bytes]:
  """The lines of a file, decompressed if it is gzip (by its first bytes, not its name), one after another.

  Raises:
    InputError: if it cannot be read, is cut off, or has a line of more than 16 MiB.
  """
  check_file(path)
  try:
    with path.open("rb") as raw:
      compressed = raw.read(2) == b"\x1f\x8b"
    with gzip.open(path) if compressed else path.open("rb") as stream:
      row = 0
      while line := stream.readline(LONGEST + 1):
        row += 1
        if len(line) > LONGEST:
          raise InputError(f"{path} line {row}: expected at most {LONGEST} bytes a line, got more; correct the file")
        yield line.removeprefix(b"\xef\xbb\xbf") if row == 1 else line
  except (EOFError, zlib.error, OSError) as error:
    came = error.strerror if isinstance(error, OSError) and error.strerror else "corrupt or cut-off data"
    raise InputError(f"{path}: expected a text file, plain or gzip, got {came}; copy or download it again") from None


def read_records(path: Path) -> Iterator[Record]:
  """The objects of a file.

  An object is a line of its own, or it goes on over several lines, as pretty-printed ones do. Commas between objects,
  and the brackets of a list around all of them, are passed over. Python literals, which the metadata of 2014 are
  written in, are read as such; nothing of a file is run.

  Args:
    path: plain or gzip.

  Yields:
    Every object, and what can be read as none with `value` None.

  Raises:
    InputError: as `read_lines`.
  """
  pending: list[bytes] = []
  start = depth = size = 0
  for row, line in enumerate(read_lines(path), start=1):
    text = line.strip()
    begins = text.startswith((b"{", b"[{"))
    if pending and not (line.startswith(b"{") and pending[0].startswith(b"{")):
      pending.append(line)
      depth, size = depth + _depth(text), size + len(line)
      if depth <= 0 or size > LONGEST:
        yield _record(start, b"".join(pending))
        pending = []
      continue
    if pending:  # Inner objects are indented: the one before was never finished.
      yield _record(start, b"".join(pending))
      pending = []
    if text in (b"", b"[", b"]", b",", b"],"):
      continue
    several = _objects(text)
    if several:
      yield from (Record(row, one) for one in several)
      continue
    depth = _depth(text) if begins and parse_object(text) is None else 0
    if depth > 0:
      pending, start, size = [line], row, len(line)
    else:
      yield _record(row, text)
  if pending:
    yield _record(start, b"".join(pending))


def _objects(text: bytes) -> list[dict[str, Any]]:
  """The objects of a whole list on one line; none if it is no such list."""
  if not (text.startswith(b"[") and text.endswith(b"]")):
    return []
  try:
    values = json.loads(text)
  except (ValueError, RecursionError):
    return []
  return values if isinstance(values, list) and all(isinstance(value, dict) for value in values) else []


def _record(row: int, text: bytes) -> Record:
  value = parse_object(text.strip())
  return Record(row, value, "" if value is not None else text.decode("utf-8", "replace"))


def _depth(text: bytes) -> int:
  """How many more braces and brackets a piece opens than it closes, those in strings aside."""
  text = _STRING.sub(b"", text)
  return sum(map(text.count, (b"{", b"["))) - sum(map(text.count, (b"}", b"]")))


def parse_object(text: bytes) -> dict[str, Any] | None:
  """The object that a text is, as JSON or as a Python literal; None if it is none."""
  text = text.removeprefix(b"[") if text.startswith(b"[{") else text
  text = text.rstrip().removesuffix(b",")
  text = text.removesuffix(b"]") if text.endswith(b"}]") else text
  if not text.startswith(b"{") or not text.endswith(b"}"):
    return None
  try:
    value = json.loads(text)
  except (ValueError, RecursionError):
    if b"'" not in text or _nesting(text) > _DEEPEST:
      return None
    try:
      with warnings.catch_warnings(action="ignore"):  # Of what Python thinks of the text of a damaged file.
        value = ast.literal_eval(text.decode("utf-8"))
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
      return None
  return value if isinstance(value, dict) and all(isinstance(name, str) for name in value) else None


def _nesting(text: bytes) -> int:
  """An upper bound of how deep brackets go."""
  depth = deepest = 0
  for sign in text:
    if sign in b"{[(":
      depth += 1
      deepest = max(deepest, depth)
    elif sign in b"}])":
      depth -= 1
  return deepest


def flat_text(value: Any, *, joiner: str = " ") -> str:
  """A value of an object as one text: the parts of lists and objects joined, nothing of what is missing.

  Args:
    value: of JSON.
    joiner: between the parts.
  """
  parts: list[str] = []
  stack, seen = [value], 0
  while stack and seen < 10_000:
    seen += 1
    one = stack.pop()
    if isinstance(one, str):
      parts.append(" ".join(one.encode("utf-8", "replace").decode().split()))
    elif isinstance(one, dict):
      stack += reversed([part for pair in one.items() for part in pair])
    elif isinstance(one, list | tuple | set):
      stack += reversed(list(one))
    elif isinstance(one, bool | int | float) and one == one:  # NaN is what is missing.
      parts.append(str(one))
  return joiner.join(dict.fromkeys(filter(None, parts)))
