"""Tables of every kind give the same rows; times, prices and columns are recognised."""

import gzip
import json
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.data.preparation.columns import ITEMS, LOG, choose
from bbqrec_jax.data.preparation.items import price_of
from bbqrec_jax.data.preparation.language import language_of
from bbqrec_jax.data.preparation.logs import read_log, read_times
from bbqrec_jax.data.preparation.quarantine import Quarantine
from bbqrec_jax.data.preparation.settings import PreparationSettings
from bbqrec_jax.data.preparation.table import UNREADABLE, as_text
from bbqrec_jax.data.preparation.tables import open_table
from bbqrec_jax.errors import InputError

ROWS = [("u 1", "a,b", "3"), ("u2", 'say "x"', "4"), ("ü3", "c", "5")]
NAMES = ("user", "item", "time")


def quoted(value):
  return '"' + value.replace('"', '""') + '"' if set(value) & set(',"') else value


def write(folder, kind):
  columns = {name: [row[place] for row in ROWS] for place, name in enumerate(NAMES)}
  path = folder / f"log.{kind}"
  if kind == "parquet":
    pyarrow.parquet.write_table(pa.table(columns | {"time": [3, 4, 5]}), path)
  elif kind == "jsonl":
    path.write_text("\n".join(json.dumps(dict(zip(NAMES, row, strict=True))) for row in ROWS))
  elif kind == "inter":
    head = "\t".join(f"{name}:{kind}" for name, kind in zip(NAMES, ("token", "token", "float"), strict=True))
    path.write_text("\n".join([head, *("\t".join(row) for row in ROWS)]))
  else:
    mark = {"csv": ",", "csv.gz": ";", "tsv": "\t", "txt": "|"}[kind]
    text = "\n".join(mark.join(map(quoted, row)) for row in [NAMES, *ROWS]) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else b"\xef\xbb\xbf" + text.encode())
  return path


def rows_of(table, quarantine, names=NAMES):
  found = []
  for batch in table.batches(names, quarantine):
    found += zip(*(as_text(batch.columns[name])[0].to_pylist() for name in names), strict=True)
  return found


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "tsv", "txt", "parquet", "jsonl", "inter"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
  table = open_table(write(tmp_path, kind), what="log")
  assert table.columns == NAMES
  assert rows_of(table, Quarantine(tmp_path / "q")) == ROWS
  assert rows_of(table, Quarantine(tmp_path / "q"), ("item",)) == [row[1:2] for row in ROWS]


@pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow", "dict"])
def test_tables_in_memory_give_the_same_rows(tmp_path, library):
  columns = {name: [row[place] for row in ROWS] for place, name in enumerate(NAMES)} | {"time": [3, 4, 5]}
  make = {"pyarrow": pa.table, "dict": dict}.get(library)
  table = open_table((make or pytest.importorskip(library).DataFrame)(columns), what="log")
  assert rows_of(table, Quarantine(tmp_path / "q")) == ROWS


def test_columns_of_several_kinds_or_of_categories_are_text(tmp_path):
  pandas = pytest.importorskip("pandas")
  names = pa.DictionaryArray.from_arrays(pa.array([1, 0, None], pa.uint32()), pa.array(["a", "b"], pa.string_view()))
  lazy = types.SimpleNamespace(collect=lambda: pa.table({"user": [1, 2, 3], "item": names}))
  mixed = pandas.DataFrame({"user": [1, "x", None], "item": pandas.Categorical(["b", "a", None])})
  expected = [[("1", "b"), ("2", "a"), ("3", "")], *[[("1", "b"), ("x", "a"), ("", "")]] * 2]
  for source, rows in zip((lazy, mixed, {name: list(mixed[name]) for name in mixed}), expected, strict=True):
    assert rows_of(open_table(source, what="log"), Quarantine(tmp_path / "q"), ("user", "item")) == rows


def test_a_column_that_comes_late_is_one(tmp_path):
  lines = [json.dumps({"id": n} | ({"price": 5} if n == 1500 else {})) for n in range(1501)]
  (tmp_path / "items.jsonl").write_text("\n".join(lines))
  assert open_table(tmp_path / "items.jsonl", what="item table").columns == ("id", "price")


@pytest.mark.parametrize("title", ['"Weird Al" Yankovic', '"Heroes"', 'say "x"'])
def test_quotes_that_are_part_of_a_text_stay(tmp_path, title):
  (tmp_path / "items.tsv").write_text(f'id\ttitle\n1\t"Weird Al" Yankovic\n2\t{title}\n')
  table = open_table(tmp_path / "items.tsv", what="item table")
  assert rows_of(table, Quarantine(tmp_path / "q"), table.columns) == [("1", '"Weird Al" Yankovic'), ("2", title)]


def test_bytes_that_are_no_utf8_are_told(tmp_path, capsys):
  (tmp_path / "items.csv").write_bytes("id,title\n1,plain\n\n2,café\n3,crème brûlée\n".encode("latin-1"))
  table = open_table(tmp_path / "items.csv", what="item table")
  rows_of(table, Quarantine(tmp_path / "q"), table.columns)
  assert "got 4 bytes that are none, the first in line 4; write it anew" in capsys.readouterr().out


def test_what_has_another_separator_or_no_header_is_told_what_to_do(tmp_path):
  (tmp_path / "ratings.dat").write_text("1::1193::5::978300760\n")
  with pytest.raises(InputError, match=r"sed 's/::/\\t/g' ratings.dat > ratings.tsv"):
    open_table(tmp_path / "ratings.dat", what="log")
  (tmp_path / "log.csv").write_text("u1,i1,5\nu2,i2,6\n")
  with pytest.raises(InputError, match="--columns=user,item"):
    read_log(open_table(tmp_path / "log.csv", what="log"), PreparationSettings(), Quarantine(tmp_path / "q"))


def test_a_file_without_a_header_is_given_names(tmp_path):
  (tmp_path / "log.csv").write_text("u,i,1\nv,j,2\n")
  table = open_table(tmp_path / "log.csv", what="log", columns=NAMES)
  assert rows_of(table, Quarantine(tmp_path / "q")) == [("u", "i", "1"), ("v", "j", "2")]
  with pytest.raises(InputError, match=r"2 columns.*got 3"):
    open_table(tmp_path / "log.csv", what="log", columns=NAMES[:2])


def test_row_numbers_count_the_rows_that_are_bad(tmp_path):
  (tmp_path / "log.csv").write_bytes(b"user,item\nu1,a\nu2\nu3,b\nu4,c,\xfed\nu5,\xff\nu6,\xc3\xa9\n")
  quarantine = Quarantine(tmp_path / "q")
  (batch,) = open_table(tmp_path / "log.csv", what="log").batches(("user", "item"), quarantine)
  assert_array_equal(batch.rows, [2, 4, 6, 7])
  quarantine.close()
  assert [json.loads(line)["row"] for line in (tmp_path / "q").read_text().splitlines()] == [3, 5]
  assert as_text(batch.columns["item"])[0].to_pylist() == ["a", "b", UNREADABLE, "é"]


@pytest.mark.parametrize(
  ("name", "content", "says"),
  [
    ("x.csv", b"", "line 1.*empty line"),
    ("x.csv", "user,item".encode("utf-16"), "UTF-8"),
    ("x.csv", b"user,user\na,b\n", "each column once"),
    ("x.parquet", b"PAR1 no", "Parquet"),
    ("x.jsonl", b"[1, 2]\n", "JSON objects"),
    ("x.xls", b"user,item\n", "another ending"),
    ("x.csv.gz", gzip.compress(b"user,item\n" * 99, mtime=0)[:-9], "cut-off"),
  ],
)
def test_what_is_no_table_is_one_line(tmp_path, name, content, says):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(InputError, match=says):
    rows_of(open_table(tmp_path / name, what="log"), Quarantine(tmp_path / "q"), ("user", "item"))


@pytest.mark.parametrize("before", ["", "u,"])
def test_a_quote_that_is_not_closed_costs_no_row_silently(tmp_path, before):
  (tmp_path / "log.csv").write_text(f'user,item\nu1,a\n{before}"a,b\n' + "c,d\n" * 5)
  quarantine = Quarantine(tmp_path / "q")
  with pytest.raises(InputError, match=r"got 6 of 7|1 of them, and 5 lines"):
    read_log(open_table(tmp_path / "log.csv", what="log"), PreparationSettings(), quarantine)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "\n", "\n\n"])
def test_lines_within_a_quote_that_is_not_closed_are_never_lost(tmp_path, end, last):
  lines = ["user,item,note", 'u1,a,"two', 'lines"', "", "u2,b,fine", 'u3,c,"open', "u4,d,", "u5,e,"]
  (tmp_path / "log.csv").write_bytes((end.join(lines) + last).encode())
  table = open_table(tmp_path / "log.csv", what="log")
  with pytest.raises(InputError, match=r"got 3 of them, and [23] lines"):
    rows_of(table, Quarantine(tmp_path / "q"), ("user", "item"))
  (tmp_path / "log.csv").write_bytes((end.join(lines).replace("open", 'closed"') + last).encode())
  found = rows_of(open_table(tmp_path / "log.csv", what="log"), Quarantine(tmp_path / "q"), ("user", "item"))
  assert found == [(f"u{n}", "abcde"[n - 1]) for n in range(1, 6)]


def test_numbers_that_pandas_made_fractions_are_ids_all_the_same():
  assert as_text(pa.array([1.0, None, 25.0]))[0].to_pylist() == ["1", "", "25"]
  assert as_text(pa.array([1.5, 2.0]))[0].to_pylist() == ["1.5", "2"]


@pytest.mark.parametrize(
  ("texts", "form", "seconds"),
  [
    (["2024-01-02", "2024-01-02 03:04:05", "2024-01-02T03:04:05.5Z", "2024-01-02T03:04:05+01:00", "2024-13-02"], "",
     [1704153600, 1704164645, 1704164645.5, 1704161045, np.nan]),
    (["2024-01-02 03:04:05 UTC", "2024-01-02T03:04:05.250000999", "2024-01-02T03:04:05.2500000Z"], "",
     [1704164645, 1704164645.25, 1704164645.25]),
    (["31/01/2024", "2024-01-31"], "%d/%m/%Y", [1706659200, np.nan]),
    (["20240131", "5"], "%Y%m%d", [1706659200, np.nan]),
    (["5", "nan", "inf"], "", [5, np.nan, np.inf]),
    (["5", " 6.5e0 ", "", "1_0", "nan", "soon"], "", [5, 6.5, np.nan, np.nan, np.nan, np.nan]),
  ],
)  # fmt: skip
def test_times_are_numbers_or_dates(texts, form, seconds):
  assert_allclose(read_times(pa.array(texts), form)[0], seconds)


@pytest.mark.parametrize(
  ("times", "unit", "usable"),
  [
    ([20240131, 20240201, 20230229, 20231231], "days written as 20240131", [1706659200, 1706745600, 1703980800]),
    ([20240131, 5, 7, 9], "numbers, taken for seconds", [20240131, 5, 7, 9]),
    (["2024-01-31", "9999-12-31", "0001-01-01", "1970-01-02"], "dates, UTC unless they say otherwise",
     [1706659200, 86400]),
  ],
)  # fmt: skip
def test_what_times_are_is_told_and_impossible_ones_are_set_aside(tmp_path, times, unit, usable):
  table = open_table({"user": ["u"] * 4, "item": list("abcd"), "time": times}, what="log")
  log = read_log(table, PreparationSettings(max_bad=0.5), Quarantine(tmp_path / "q"))
  assert log.unit == unit
  assert_allclose(log.time, usable)


def test_whole_numbers_past_those_that_a_float_holds_are_the_nearest():
  values, is_date = read_times(pa.array([2**60 + 1, 5], pa.int64()))
  assert_allclose(values, [2.0**60, 5], rtol=0)
  assert not is_date.any()


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_typed_dates_are_seconds(unit):
  dates = pa.array(np.array(["2024-01-02T03:04:05", "NaT"], f"datetime64[{unit}]"))
  values, is_date = read_times(dates)
  assert_allclose(values, [1704164645, np.nan])
  assert is_date.all()


def test_columns_are_guessed_by_their_names():
  names = ("CustomerID", "Product ID", "rating", "Time Stamp", "extra")
  none = dict.fromkeys(LOG, "")
  assert choose(names, LOG, none, ("user", "item"), where="log") == {
    "user": ("CustomerID",), "item": ("Product ID",), "time": ("Time Stamp",), "rating": ("rating",)
  }  # fmt: skip
  assert "time" not in choose(names, LOG, none | {"time": "none"}, ("user",), where="log")
  assert choose(names, LOG, none | {"user": "extra"}, ("user",), where="log")["user"] == ("extra",)
  items = choose(("asin", "title", "genres", "description", "main_category"), ITEMS, {}, ("item_id",), where="items")
  assert items["category"] == ("main_category", "genres")
  with pytest.raises(InputError, match=r"extr.*--user.*did you mean 'extra'"):
    choose(names, LOG, none | {"user": "extr"}, ("user",), where="log")
  with pytest.raises(InputError, match=r"could not guess.*--user=COLUMN"):
    choose(("a", "b"), LOG, none, ("user",), where="log")


@pytest.mark.parametrize(
  ("text", "price"),
  [("$1,299.00", 1299.0), ("12,99 €", 12.99), ("1.234,5", 1234.5), ("free", None), ("5", 5.0), ("$4.5 - $6", 4.5),
   ("-1", None), ("$-1", None), ("2.500,-", 2500.0), ("12,-", 12.0), ("1e3", 1000.0), ("1.5E+6", 1.5e6),
   ("1e400", None)],
)  # fmt: skip
def test_prices_are_numbers(text, price):
  assert price_of(text) == price


@pytest.mark.parametrize(
  ("text", "language"),
  [("a lamp for the kitchen", "English"), ("Lampe für die Küche", "German"), ("赤い皿です", "Japanese"),
   ("красная лампа", "Cyrillic script"), ("une lampe pour la cuisine", "French"), ("XJ-9", "unknown")],
)  # fmt: skip
def test_languages_are_told_apart(text, language):
  assert language_of(text) == language
