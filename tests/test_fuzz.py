"""Every reader of files against damaged and hostile ones, in short; the long form is experiments/fuzz.py itself."""

import io
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bbqrec_jax.errors import InputError

CASES = 60
READERS = (
  "sequences.txt", "timestamps.txt", "users.txt", "items.jsonl", "items.jsonl.gz", "features.npy", "has.npy",
  "new items' features", "asked histories, text", "asked histories, JSON", "RecBole .inter", "RecBole .item",
  "logs, CSV", "logs, TSV", "logs, Parquet", "logs, JSON", "item tables, CSV", "item tables, literals",
  "dump of 2014", "dump of 2018", "dump of 2023", "asked histories, Parquet",
  "pictures", "pictures' features",
  "item tables, Parquet", "item tables, JSON", "RecBole prepared, .inter", "RecBole prepared, .item",
  "allow and deny files", "vectors to join", "vectors to join, Parquet", "words to be like", "features.json",
  "artefact arrays", "artefact encoder.npz", "artefact semantic_ids.json", "artefact item_ids.json",
  "artefact forged", "tokenizer settings", "run.json", "config.json", "config.json forged", "results.json",
  "recommender.json", "health.json",
)  # fmt: skip

pytestmark = [
  pytest.mark.filterwarnings("ignore:Reading `.npy` or `.npz` file required additional header parsing"),
  pytest.mark.filterwarnings("ignore:Stored array in format 3.0"),
]
few = settings(
  max_examples=60, deadline=None, database=None, derandomize=True,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@pytest.fixture(scope="module")
def fuzz(load_file):
  return load_file("experiments/fuzz.py")


def test_every_reader_is_tried(fuzz):
  assert tuple(fuzz.readers()) == READERS


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_in_one_line_or_loaded_as_they_stand(fuzz, name):
  assert fuzz.verdict(fuzz.readers()[name], fuzz.damaged(name, 0)) == ("loaded", "")
  counts, wrong = fuzz.run_cases(name, 1, CASES)
  assert not wrong
  assert counts["refused"]


@pytest.mark.parametrize(
  ("name", "file"),
  [
    ("sequences.txt", "sequences.txt"), ("items.jsonl", "items.jsonl"), ("items.jsonl.gz", "items.jsonl.gz"),
    ("features.npy", "text_features.npy"), ("RecBole .inter", "tiny.inter"), ("RecBole .item", "tiny.item"),
    ("artefact encoder.npz", "encoder.npz"), ("config.json", "config.json"),
  ],
)  # fmt: skip
def test_any_bytes_are_refused_or_read_as_the_independent_reader_reads_them(fuzz, name, file):
  reader = fuzz.readers()[name]

  @few
  @given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode(errors="surrogatepass")))
  def check(content):
    assert fuzz.verdict(reader, reader.files | {file: content})[0] != "wrong"

  check()


def test_histories_written_in_any_allowed_way_are_read_as_meant(fuzz):
  blank = st.text(" \t\v\f", min_size=1, max_size=3)
  label = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1, max_size=20)
  item = st.integers(0, 3).flatmap(lambda item: st.sampled_from([f"{item}", f"0{item}", f"{item:030d}"]))
  history = st.lists(st.tuples(blank, item), min_size=3, max_size=6)
  reader = fuzz.readers()["sequences.txt"]
  files = {name: content for name, content in reader.files.items() if name != "timestamps.txt"}

  @few
  @given(st.dictionaries(label, history, min_size=1, max_size=5), st.sampled_from(["\n", "\r\n"]))
  def check(users, end):
    lines = (user + "".join(blank + item for blank, item in history) + end for user, history in users.items())
    kind, loaded = fuzz.attempt(reader, files | {"sequences.txt": "".join(lines).encode()})
    assert (kind, loaded[0]) == ("loaded", [(user, [int(item) for _, item in own]) for user, own in users.items()])

  check()


def test_arrays_of_any_dtype_and_shape_are_refused_or_read_as_they_are(fuzz):
  shapes = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6)
  places = [
    ("features.npy", "text_features.npy"), ("has.npy", "has_image.npy"), ("new items' features", "image_features.npy"),
    ("artefact arrays", "codes.npy"), ("artefact arrays", "present.npy"),
  ]  # fmt: skip

  @few
  @given(arrays.arrays(arrays.scalar_dtypes() | arrays.array_dtypes(), shapes), st.sampled_from(places), st.booleans())
  def check(array, place, transposed):
    name, file = place
    reader = fuzz.readers()[name]
    content = io.BytesIO()
    np.save(content, np.asfortranarray(array) if transposed else array, allow_pickle=True)
    assert fuzz.verdict(reader, reader.files | {file: content.getvalue()})[0] != "wrong"

  check()


def test_any_json_in_a_line_of_items_is_refused_or_read(fuzz):
  value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text() | st.just("title"), below, max_size=3),
    max_leaves=8,
  )
  reader = fuzz.readers()["items.jsonl"]

  @few
  @given(st.lists(value | st.fixed_dictionaries({"title": st.text() | st.none()}), min_size=4, max_size=4))
  def check(rows):
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    assert fuzz.verdict(reader, reader.files | {"items.jsonl": content})[0] != "wrong"

  check()


def broken(fuzz, read):
  reader = fuzz.readers()["sequences.txt"]
  return fuzz.verdict(reader._replace(read=read), reader.files)[0]


def test_a_reader_that_goes_wrong_is_found_out(fuzz, monkeypatch):
  right = fuzz.readers()["sequences.txt"].read
  assert broken(fuzz, right) == "loaded"

  def fail(error):
    def read(folder):
      raise error

    return read

  def spin(folder):
    while True:
      pass

  assert broken(fuzz, fail(KeyError("x"))) == "wrong"
  assert broken(fuzz, fail(MemoryError())) == "wrong"
  assert broken(fuzz, fail(InputError("the files are right"))) == "wrong"
  assert broken(fuzz, lambda folder: right(folder)[:-1]) == "wrong"
  assert broken(fuzz, lambda folder: [right(folder), (folder / "new").touch()][0]) == "wrong"
  monkeypatch.setattr(fuzz, "SECONDS", 0.1)
  assert broken(fuzz, spin) == "wrong"
  monkeypatch.setattr(fuzz, "exploded", lambda: True)
  assert broken(fuzz, right) == "wrong"


def test_the_long_form_writes_a_row_for_each_reader(fuzz, tmp_path):
  command = [
    "experiments/fuzz.py",
    "--cases=20",
    "--readers=health.json,run.json",
    f"--output={tmp_path / 'rows.json'}",
  ]
  root = pathlib.Path(fuzz.__file__).parents[1]
  subprocess.run([sys.executable, *command], cwd=root, check=True, capture_output=True, timeout=300)
  rows = json.loads((tmp_path / "rows.json").read_text())
  assert [row["reader"] for row in rows] == ["health.json", "run.json"]
  for row in rows:
    assert row.keys() == {"reader", "cases", "loaded", "refused", "wrong"}
    assert row["loaded"] + row["refused"] == row["cases"] == 20
