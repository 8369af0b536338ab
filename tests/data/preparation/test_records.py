"""Files of objects: one a line or spread over many, JSON or Python literals, plain or gzip; none of them is run."""

import gzip
import json
import warnings

import pytest

from bbqrec_jax.data.preparation.records import flat_text, parse_object, read_records
from bbqrec_jax.errors import InputError

OBJECTS = [{"id": "a", "of": [{"x": 1}, {"y": "}{"}]}, {"id": "b", "text": 'two\n"lines"'}, {"id": "c"}]


def values(path):
  return [record.value for record in read_records(path)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("indent", [None, 1, 4])
@pytest.mark.parametrize("listed", [False, True])
def test_objects_are_read_however_they_are_laid_out(tmp_path, packed, indent, listed):
  text = "\n".join(json.dumps(one, indent=indent) for one in OBJECTS)
  if listed:
    text = json.dumps(OBJECTS, indent=indent) if indent else f"[{text}]".replace("\n", ",\n")
  (tmp_path / "x.json").write_bytes(gzip.compress(text.encode()) if packed else text.encode())
  assert values(tmp_path / "x.json") == OBJECTS


def test_a_list_on_one_line_is_its_objects(tmp_path):
  (tmp_path / "x.json").write_text(json.dumps(OBJECTS) + "\n")
  assert values(tmp_path / "x.json") == OBJECTS


def test_python_literals_are_read_and_not_run(tmp_path):
  lines = ["{'asin': 'B1', 'title': \"it's\", 'price': 4.5, 'salesRank': {'Toys': 3}}", "{'asin': __import__('os')}"]
  (tmp_path / "meta.json").write_text("\n".join(lines))
  assert values(tmp_path / "meta.json") == [
    {"asin": "B1", "title": "it's", "price": 4.5, "salesRank": {"Toys": 3}},
    None,
  ]


def test_what_python_thinks_of_a_damaged_file_is_not_said():
  with warnings.catch_warnings(action="error"):
    assert parse_object(b"{'asin': 0xfor}") is None
    assert parse_object(b"{'asin': '\\d'}") == {"asin": "\\d"}


def test_a_broken_object_takes_no_other_with_it(tmp_path):
  (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": [2\n{"a": 3}\nnothing\n\n[1]\n{"a": 4}\n{"a": "5')
  records = list(read_records(tmp_path / "x.jsonl"))
  assert [(record.row, record.value) for record in records] == [
    (1, {"a": 1}), (2, None), (3, {"a": 3}), (4, None), (6, None), (7, {"a": 4}), (8, None)
  ]  # fmt: skip
  assert records[1].text.startswith('{"a": [2')


def test_a_cut_off_file_is_refused(tmp_path):
  (tmp_path / "x.json.gz").write_bytes(gzip.compress(json.dumps(OBJECTS).encode(), mtime=0)[:-9])
  with pytest.raises(InputError, match=r"x\.json\.gz.*cut-off"):
    values(tmp_path / "x.json.gz")


@pytest.mark.parametrize("text", [b"{" * 5000, b"{'a':" + b"[" * 5000, b"{'a': " + b"(" * 90 + b")" * 90 + b"}", b"3"])
def test_what_is_no_object_is_none(text):
  assert parse_object(text) is None


def test_values_become_one_text():
  assert flat_text(["A", ["B", {"c": 2.5}], None, float("nan"), "A"]) == "A B c 2.5"
  assert flat_text("half \ud800") == "half ?"
