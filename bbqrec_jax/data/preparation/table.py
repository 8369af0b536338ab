"""What a table is, a batch of rows at a time, and the texts of its columns."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bbqrec_jax.data.preparation.quarantine import Quarantine
from bbqrec_jax.data.preparation.records import flat_text
from bbqrec_jax.errors import InputError, shown

ROWS = 2**16  # Of a batch.
UNREADABLE = "\x1a"  # What stands for a byte that is no UTF-8; the sign that Unicode calls a substitute.
_MOST_COLUMNS = 1000


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
    path: of the file; None in memory.
    sequences: columns of several tokens a cell, RecBole's `token_seq`.
    vectors: columns of numbers separated by blanks, RecBole's `float_seq`.
  """

  name: str
  columns: tuple[str, ...]
  batches: Callable[[Sequence[str], Quarantine], Iterator[Batch]]
  path: Path | None = None
  sequences: tuple[str, ...] = ()
  vectors: tuple[str, ...] = ()


def unique_columns(columns: Sequence[str], *, where: str) -> tuple[str, ...]:
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


def one_text(value: Any) -> str | None:
  """A JSON value as text; "" for half a character, which no text may hold."""
  if value is None or value != value:
    return None
  if isinstance(value, str):
    return value if value.isascii() else value.encode("utf-8", "replace").decode()
  if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
    return str(int(value))
  return flat_text(value, joiner=" > ") if isinstance(value, list | dict) else str(value)


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
    array = pa.array([one_text(value) for value in array.to_pylist()], pa.string())
  elif not pa.types.is_string(kind):
    array = array.cast(pa.string())
  return pc.utf8_trim_whitespace(pc.fill_null(array, "")), wrong


def _is_bad(value: bytes | None) -> bool:
  try:
    (value or b"").decode()
  except UnicodeDecodeError:
    return True
  return False
