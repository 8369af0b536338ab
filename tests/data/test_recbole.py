"""RecBole's atomic files: tiny ones with known content, and every way to get one wrong."""

import gzip
from types import SimpleNamespace

import numpy as np
import pytest

from bbqrec_jax.data import recbole
from bbqrec_jax.data.sources import load, load_recbole
from bbqrec_jax.errors import InputError

# Out of order in time; u1 has two interactions at time 5, kept as in the file, and one repeated.
INTER = """user_id:token\titem_id:token\trating:float\ttimestamp:float
u2\tb\t1\t30
u1\tc\t1\t5
u1\ta\t1\t5
u2\ta\t1\t10
u1\tb\t1\t1.5
u2\tb\t1\t2e1
u1\tb\t1\t99
"""
ITEM = """item_id:token\tmovie_title:token_seq\ttext_emb:float_seq\taudio:float_seq
a\tFilm A\t1 2\t
b\tFilm B\t3.5 -4e-1\t1 0 2
c\tFilm Č\t0 0\t3 4 5
"""


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "tiny.inter").write_text(INTER)
  (tmp_path / "tiny.item").write_text(ITEM)
  return tmp_path


def refusal(folder, *parts, **options):
  with pytest.raises(InputError) as error:
    load_recbole(folder, **options)
  message = str(error.value)
  assert "\n" not in message
  assert all(part in message for part in parts), message


def histories(dataset):
  interactions = dataset.interactions
  return {str(user): interactions.history(row).tolist() for row, user in enumerate(interactions.users)}


def test_a_folder_is_read_as_written(folder):
  dataset = load_recbole(folder)
  assert histories(dataset) == {"u2": [0, 1, 1], "u1": [1, 2, 0, 1]}
  assert dataset.titles == ("Film A", "Film B", "Film Č")
  assert dataset.modalities == ("audio", "text")
  np.testing.assert_allclose(dataset.features["text"], [[1, 2], [3.5, -0.4], [0, 0]])
  np.testing.assert_allclose(dataset.features["audio"], [[0, 0, 0], [1, 0, 2], [3, 4, 5]])
  np.testing.assert_array_equal(dataset.present["text"], [True, True, False])
  np.testing.assert_array_equal(dataset.present["audio"], [False, True, True])
  assert dataset.features["text"].dtype == np.float32
  assert (dataset.name, dataset.source) == ("tiny", str(folder))
  assert dataset.item_ids.to_json() == ["a", "b", "c"]


def test_without_timestamps_the_order_is_the_files(folder):
  rows = [line.split("\t")[:2] for line in INTER.splitlines()]
  (folder / "tiny.inter").write_text("".join("\t".join(row) + "\n" for row in rows))
  assert histories(load_recbole(folder)) == {"u2": [1, 0, 1], "u1": [2, 0, 1, 1]}


def test_columns_that_tell_of_items_and_are_not_read_are_named(tmp_path):
  lines = [f"u{user}\ti{item}" for user in range(2) for item in range(4)]
  (tmp_path / "x.inter").write_text("\n".join(["user_id:token\titem_id:token", *lines]))
  rows = [f"i{item}\tT\tsome text\tAcme" for item in range(4)]
  (tmp_path / "x.item").write_text("\n".join(["item_id:token\ttitle:token\tdescription:token_seq\tbrand:token", *rows]))
  (note,) = [note for note in load_recbole(tmp_path).notes if "not used" in note]
  assert "description, brand of x.item; bbqrec prepare" in note


def test_the_notes_say_how_histories_were_ordered_and_what_was_not_used(folder):
  assert load_recbole(folder).notes == ("histories ordered by timestamp",)
  np.save(folder / "image.npy", np.eye(3))
  (folder / "tiny.inter").write_text(INTER.replace("timestamp:float", "time:float").replace("rating", "Date"))
  order, warning, unused = load_recbole(folder).notes
  assert order == "histories ordered as in the file, without timestamps"
  assert warning.startswith("warning: tiny.inter has Date:float, time:float and no timestamp:float; if")
  assert "rename it to timestamp:float" in warning
  assert unused == "not used: image.npy (read are NAME_features.npy, has_NAME.npy)"
  (folder / "tiny.inter").write_text(INTER.replace("rating", "date"))
  assert load_recbole(folder).notes[0] == "histories ordered by timestamp"
  assert not any("warning" in note for note in load_recbole(folder).notes)


def test_without_an_item_table_items_are_numbered_as_they_appear(folder):
  (folder / "tiny.item").unlink()
  np.save(folder / "text_features.npy", np.eye(3, dtype=np.float32))
  dataset = load_recbole(folder)  # b, c, a
  assert histories(dataset) == {"u2": [2, 0, 0], "u1": [0, 1, 2, 0]}
  assert dataset.titles == ("", "", "")
  np.testing.assert_array_equal(dataset.features["text"], np.eye(3))


def test_columns_may_stand_in_any_order_and_lines_end_in_crlf(folder):
  rows = [line.split("\t") for line in INTER.splitlines()]
  (folder / "tiny.inter").write_bytes(("\ufeff" + "\r\n".join("\t".join(row[::-1]) for row in rows)).encode())
  assert histories(load_recbole(folder)) == {"u2": [0, 1, 1], "u1": [1, 2, 0, 1]}


@pytest.mark.parametrize("end", ["\n", "\n\n", "\r\n \t\r\n", "\t\t\t\n\n", "\n  "])
def test_blank_lines_at_the_end_are_none(folder, end):
  expected = load_recbole(folder)
  (folder / "tiny.inter").write_bytes((INTER + end).encode())
  (folder / "tiny.item").write_bytes((ITEM + end).encode())
  found = load_recbole(folder)
  assert histories(found) == histories(expected)
  assert found.titles == expected.titles


def test_the_last_line_keeps_its_empty_field(folder):
  rows = INTER.splitlines()
  lines = [rows[0] + "\tnote:token", *(row + "\t" for row in rows[1:])]
  (folder / "tiny.inter").write_text("\n".join(lines))
  assert histories(load_recbole(folder)) == {"u2": [0, 1, 1], "u1": [1, 2, 0, 1]}


@pytest.mark.parametrize("column", ["title", "item_name", "name"])
def test_titles_come_from_any_of_the_usual_columns(folder, column):
  (folder / "tiny.item").write_text(ITEM.replace("movie_title", column))
  assert load_recbole(folder).titles[0] == "Film A"


@pytest.mark.parametrize("column", ["text", "text_feature", "text_features"])
def test_modalities_lose_the_usual_endings(folder, column):
  (folder / "tiny.item").write_text(ITEM.replace("text_emb", column))
  assert load_recbole(folder).modalities == ("audio", "text")


def test_feature_files_are_modalities_too(folder):
  np.save(folder / "image_features.npy", np.eye(3, dtype=np.float16))
  np.save(folder / "has_image.npy", np.array([True, False, True]))
  dataset = load_recbole(folder, modalities=("text", "image"))
  assert dataset.modalities == ("text", "image")
  np.testing.assert_array_equal(dataset.present["image"], [True, False, True])


@pytest.mark.parametrize(
  ("cells", "dtype"),
  [
    (["1 2", "3.5 -4e-1", ""], np.float32),
    (["1700000000.25 1", "1700000090.75 2", "1700000031.5 3"], np.float64),
    (["1700000000.25 1", "1700000000.25 2", "1700000000.25 3"], np.float32),
    (["1e-50 1", "3e-50 2", "2e-50 3"], np.float64),
  ],
)
def test_columns_are_float32_unless_that_would_blur_them(folder, cells, dtype):
  lines = [f"{item}\t{cell}\n" for item, cell in zip("abc", cells, strict=True)]
  (folder / "tiny.item").write_text("item_id:token\ttext:float_seq\n" + "".join(lines))
  array = load_recbole(folder).features["text"]
  assert array.dtype == dtype
  expected = np.array([[float(number) for number in cell.split()] or [0, 0] for cell in cells])
  np.testing.assert_array_equal(array, expected.astype(dtype))


def test_many_interactions_against_a_plain_python_oracle(folder, monkeypatch):
  monkeypatch.setattr(recbole, "_ROWS", 300)
  rng = np.random.default_rng(0)
  rows = [(f"u{rng.integers(40)}", f"item-{rng.integers(300)}", int(rng.integers(50))) for _ in range(2000)]
  text = "".join(f"{user}\t{item}\t{time}\n" for user, item, time in rows)
  (folder / "tiny.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + text)
  (folder / "tiny.item").unlink()
  order = {item: number for number, item in enumerate(dict.fromkeys(item for _, item, _ in rows))}
  np.save(folder / "text_features.npy", np.ones((len(order), 1)))
  expected = {}
  for user, item, time in rows:
    expected.setdefault(user, []).append((time, order[item]))
  expected = {user: [item for _, item in sorted(pairs, key=lambda pair: pair[0])] for user, pairs in expected.items()}
  assert histories(load_recbole(folder)) == expected


@pytest.mark.parametrize(
  ("old", "new", "parts"),
  [
    ("u1\tc\t1\t5\n", "u1\tc\t1\n", ["line 3", "expected 4 tab-separated fields", "got 3"]),
    ("u1\tc\t1\t5\n", "u1\tc\t1\t5\t6\n", ["line 3", "expected 4 tab-separated fields", "got 5"]),
    ("u1\tc\t1\t5\n", "\n", ["line 3", "expected 4 tab-separated fields", "got 1"]),
    ("u1\tc\t1\t5\n", "u1\tz\t1\t5\n", ["line 3 field 'item_id'", "expected an item of", "tiny.item", "got 'z'"]),
    ("u1\tc\t1\t5\n", "\tc\t1\t5\n", ["line 3 field 'user_id'", "expected a token", "empty field"]),
    ("u1\tc\t1\t5\n", "u1\t\t1\t5\n", ["line 3 field 'item_id'", "expected a token", "empty field"]),
    ("u1\tc\t1\t5\n", "u1\tc\t1\tnoon\n", ["line 3 field 'timestamp'", "expected a finite number", "got 'noon'"]),
    ("u1\tc\t1\t5\n", "u1\tc\t1\t1_0\n", ["line 3 field 'timestamp'", "expected a finite number", "got '1_0'"]),
    ("u1\tc\t1\t5\n", "u1\tc\t1\tnan\n", ["line 3 field 'timestamp'", "expected a finite number", "got 'nan'"]),
    ("u1\tc\t1\t5\n", "u1\tc\t1\t\n", ["line 3 field 'timestamp'", "expected a finite number", "got ''"]),
    ("u1\tc\t1\t5\n", "u1,c,1,5\n", ["line 3", "tab-separated fields", "got 1, and commas in 'u1,c,1,5'"]),
    ("u1\tc\t1\t5\n", "u1\tc 1 5\n", ["line 3", "expected 4 tab-separated", "got 2; correct"]),
    (INTER, INTER.replace("\t", " "), ["line 1", "separated by tabs", "got blanks in 'user_id:token item_id:token"]),
    (INTER, INTER.replace("\t", ", "), ["line 1", "separated by tabs", "got commas in 'user_id:token, item_id"]),
    (INTER, INTER.replace("\t", ";"), ["line 1", "separated by tabs", "got semicolons in 'user_id:token;item"]),
    (INTER, INTER.replace("\t", "|"), ["line 1", "separated by tabs", "got vertical bars in 'user_id:token|item"]),
    (
      INTER,
      "user_id,item_id\nu,a\n",
      ["line 1", "expected columns name:type", "commas", "user_id:token, item_id:token"],
    ),
    (INTER, "user_id\titem_id\nu\ta\n", ["line 1 field 1", "got 'user_id'", "user_id:token, item_id:token, timestamp"]),
    ("user_id:token", "uid:token", ["line 1", "expected a column user_id:token", "uid:token"]),
    ("item_id:token", "item_id:float", ["line 1", "expected a column item_id:token"]),
    ("rating:float", "rating", ["line 1 field 3", "header of name:type", "got 'rating'"]),
    ("rating:float", "item_id:token", ["line 1 field 3", "expected each column once", "'item_id' again"]),
    (INTER, "", ["line 1", "header of name:type", "got ''"]),
    (INTER, INTER.splitlines()[0], ["expected at least one user", "found none"]),
  ],
)
def test_bad_interactions_are_refused(folder, old, new, parts):
  assert old in INTER
  (folder / "tiny.inter").write_text(INTER.replace(old, new))
  refusal(folder, str(folder / "tiny.inter"), *parts)


@pytest.mark.parametrize(
  ("old", "new", "parts"),
  [
    ("b\tFilm B\t3.5 -4e-1\t", "b\tFilm B\t3.5\t", ["line 3 field 'text_emb'", "expected 2 numbers", "got 1"]),
    ("3.5 -4e-1", "3.5 nan", ["line 3 field 'text_emb'", "expected finite float32 numbers", "got 'nan'"]),
    ("3.5 -4e-1", "3.5 1_0", ["line 3 field 'text_emb'", "expected finite float32 numbers", "got '1_0'"]),
    ("3.5 -4e-1", "3.5 x", ["line 3 field 'text_emb'", "expected finite float32 numbers", "got 'x'"]),
    ("3.5 -4e-1", "3.5 1e39", ["line 3 field 'text_emb'", "expected finite float32 numbers", "got '1e39'"]),
    (
      "3.5 -4e-1",
      "3.5,-4e-1 1",
      ["line 3 field 'text_emb'", "got '3.5,-4e-1'", "separate them by spaces, and leave the field empty"],
    ),
    ("b\tFilm B", "a\tFilm B", ["line 3 field 'item_id'", "each item on one line", "'a' again", "first on line 2"]),
    ("b\tFilm B", "\tFilm B", ["line 3 field 'item_id'", "expected a token", "empty field"]),
    ("b\tFilm B", "b", ["line 3", "expected 4 tab-separated fields", "got 3"]),
    ("item_id:token", "id:token", ["line 1", "expected a column item_id:token"]),
    ("audio:float_seq", "text:float_seq", ["line 1", "expected different modalities", "'text'", "rename"]),
    (ITEM, ITEM.splitlines()[0], ["expected at least one item", "only a header"]),
    (ITEM, "", ["line 1", "header of name:type"]),
    (ITEM, "item_id:token\tx:float_seq\na\t\nb\t\nc\t\n", ["field 'x'", "expected numbers for some items"]),
    (ITEM, "item_id:token\tx:float_seq\na\t0 0\nb\t\nc\t0 -0.0\n", ["field 'x'", "none or zeros; remove the column"]),
  ],
)
def test_bad_items_are_refused(folder, old, new, parts):
  assert old in ITEM
  (folder / "tiny.item").write_text(ITEM.replace(old, new))
  refusal(folder, str(folder / "tiny.item"), *parts)


def test_a_mask_of_a_column_is_refused(folder):
  np.save(folder / "has_audio.npy", np.ones(3, bool))
  refusal(folder, str(folder / "has_audio.npy"), "'audio' is a column", "leave the column's cell empty")


def test_tables_may_be_compressed(folder):
  expected = histories(load_recbole(folder))
  for name in ("tiny.inter", "tiny.item"):
    (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
    refusal(folder, f"expected one .{name[5:]} file, found {name}, {name}.gz; keep one")
    (folder / name).unlink()
    dataset = load_recbole(folder)
    assert histories(dataset) == expected
    assert (dataset.name, dataset.titles[0]) == ("tiny", "Film A")


@pytest.mark.parametrize("suffix", ["inter", "item"])
def test_two_files_of_a_kind_are_refused(folder, suffix):
  (folder / f"other.{suffix}").write_text("")
  refusal(folder, str(folder), f"expected one .{suffix} file", f"other.{suffix}, tiny.{suffix}")


def test_a_missing_interactions_file_is_named(folder):
  (folder / "tiny.inter").unlink()
  refusal(folder, str(folder), "expected one .inter file", "found none")
  (folder / "sequences.txt").write_text("a 0 1 2\n")
  refusal(folder, "--config.data.source=directory")


def test_there_may_be_no_features(folder):
  (folder / "tiny.item").unlink()
  dataset = load_recbole(folder)
  assert (dataset.modalities, dataset.num_items) == ((), 3)


def test_an_unknown_modality_is_refused_with_those_found(folder):
  refusal(folder, "audio, text", "got 'image'", modalities=("image",))


def test_a_modality_in_a_column_and_in_a_file_is_refused(folder):
  np.save(folder / "text_features.npy", np.eye(3))
  refusal(folder, str(folder / "text_features.npy"), "expected each modality once")


def test_features_of_another_catalogue_are_refused(folder):
  np.save(folder / "image_features.npy", np.eye(4))
  refusal(folder, str(folder / "image_features.npy"), "expected 3 rows", "got 4")


def test_load_reads_recbole(folder):
  settings = SimpleNamespace(
    source="recbole", path=str(folder), modalities=("text",), drop_short_users=False, drop_incomplete_items=False
  )
  assert load(settings).modalities == ("text",)
