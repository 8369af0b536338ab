"""Tables of any kind, read a batch of rows at a time, with the rows that cannot be read set aside.

CSV and TSV, Parquet, JSON lines, RecBole's atomic files, and tables in memory (pandas, polars, pyarrow, dictionaries).
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bbqrec_jax.data.preparation.csv_tables import csv_table
from bbqrec_jax.data.preparation.quarantine import Quarantine
from bbqrec_jax.data.preparation.records import read_records
from bbqrec_jax.data.preparation.table import ROWS, Batch, Table, one_text, unique_columns
from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.files import check_file

_LOOKED_AT = 1000  # Objects whose names are the columns of a log of them; each has what a log needs.


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
    return csv_table(path, tuple(columns))
  raise InputError(
    f"{path}: expected the {what} as .csv, .tsv, .parquet or .jsonl (or .inter, .item of RecBole), plain or .gz, got"
    " another ending; rename the file, or write it as one of them"
  )


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
      for block in pyarrow.parquet.ParquetFile(path).iter_batches(ROWS, columns=list(dict.fromkeys(chosen))):
        yield Batch(dict(zip(block.schema.names, block.columns, strict=True)), np.arange(first, first + len(block)))
        first += len(block)
    except (pa.ArrowException, OSError, ValueError) as error:
      if isinstance(error, InputError):
        raise
      raise refuse(error) from None

  return Table(path.name, unique_columns(columns, where=str(path)), batches)


def _json_table(path: Path, looked_at: int | None) -> Table:
  names: dict[str, None] = {}
  for record in itertools.islice(read_records(path), looked_at):
    names |= dict.fromkeys(record.value or ())
  if not names:
    raise InputError(f"{path}: expected JSON objects with names, one a line, found none; give a file of them")

  def batches(chosen: Sequence[str], quarantine: Quarantine) -> Iterator[Batch]:
    records = read_records(path)
    while block := list(itertools.islice(records, ROWS)):
      whole = []
      for record in block:
        if record.value is None:
          quarantine.add(path.name, record.row, "no JSON object", record.text)
        else:
          whole.append(record)
      values = [[record.value.get(name) for record in whole if record.value is not None] for name in chosen]
      yield Batch(
        {name: pa.array(map(one_text, column), pa.string()) for name, column in zip(chosen, values, strict=True)},
        np.array([record.row for record in whole], np.int64),
      )

  return Table(path.name, unique_columns(tuple(names), where=str(path)), batches)


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
        table = pa.table(source.assign(**{name: mixed[name].map(one_text, na_action="ignore") for name in mixed}))
    else:
      table = pa.Table.from_pandas(source, preserve_index=False)
  except Exception as error:  # Whatever a library makes of columns that are none.
    raise InputError(f"{what}: expected a path or a table (pandas, polars, pyarrow, dictionary), got {error}") from None

  def batches(chosen: Sequence[str], quarantine: Quarantine) -> Iterator[Batch]:
    del quarantine
    first = 0
    for block in table.select(list(dict.fromkeys(chosen))).to_batches(ROWS):
      yield Batch(dict(zip(block.schema.names, block.columns, strict=True)), np.arange(first, first + len(block)))
      first += len(block)

  return Table(what, unique_columns(tuple(table.column_names), where=what), batches)


def _array(values: Any) -> pa.Array:
  try:
    return pa.array(values, from_pandas=True)
  except (pa.ArrowInvalid, pa.ArrowTypeError):  # Of several kinds.
    return pa.array([one_text(value) for value in values], pa.string())
