"""The project's folders: a tiny one with known content, every way to get one wrong, and the real ones if present."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bbqrec_jax.data.directory import read_new_items
from bbqrec_jax.data.interactions import leave_one_out
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.data.sources import complete_items, format_statistics, load, load_directory, statistics
from bbqrec_jax.errors import InputError

SEQUENCES = "ann 0 1 2\nbob 3 2 1 0\ncy 2 2 3\n"
ITEMS = "".join(json.dumps({"id": item, "title": title}) + "\n" for item, title in enumerate(["A", "", "Ć", "D"]))
TEXT = np.arange(1, 9, dtype=np.float16).reshape(4, 2)
IMAGE = np.array([[1, 2, 3], [0, 0, 0], [4, 5, 6], [7, 8, 9]], np.float32)


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "sequences.txt").write_text(SEQUENCES)
  (tmp_path / "items.jsonl.gz").write_bytes(gzip.compress(ITEMS.encode()))
  np.save(tmp_path / "text_features.npy", TEXT)
  np.save(tmp_path / "image_features.npy", IMAGE)
  return tmp_path


def refusal(folder, *parts, **options):
  before = sorted(path.name for path in folder.iterdir())
  with pytest.raises(InputError) as error:
    load_directory(folder, **options)
  message = str(error.value)
  assert "\n" not in message
  assert all(part in message for part in parts), message
  assert sorted(path.name for path in folder.iterdir()) == before


def histories(dataset):
  interactions = dataset.interactions
  return {str(user): interactions.history(row).tolist() for row, user in enumerate(interactions.users)}


def test_a_folder_is_read_as_written(folder):
  dataset = load_directory(folder)
  assert histories(dataset) == {"ann": [0, 1, 2], "bob": [3, 2, 1, 0], "cy": [2, 2, 3]}
  assert dataset.titles == ("A", "", "Ć", "D")
  assert dataset.modalities == ("image", "text")
  assert dataset.num_items == 4
  np.testing.assert_array_equal(dataset.features["text"], TEXT)
  np.testing.assert_array_equal(dataset.features["image"], IMAGE)
  np.testing.assert_array_equal(dataset.present["image"], [True, False, True, True])
  assert (dataset.name, dataset.source) == (folder.name, str(folder))


def test_the_modalities_asked_for_come_in_that_order(folder):
  assert load_directory(folder, modalities=("text", "image")).modalities == ("text", "image")
  assert load_directory(folder, modalities=["text"]).modalities == ("text",)


def test_a_mask_file_is_used(folder):
  np.save(folder / "has_text.npy", np.array([0, 1, 1, 0]))
  np.testing.assert_array_equal(load_directory(folder).present["text"], [False, True, True, False])


@pytest.mark.parametrize(
  "content",
  [
    "\ufeff" + SEQUENCES,
    SEQUENCES.replace("\n", "\r\n"),
    SEQUENCES.removesuffix("\n"),
    SEQUENCES.replace(" ", "\t"),
    SEQUENCES.replace(" ", "  ").replace("\n", " \n"),
    SEQUENCES.replace(" 1", " 01"),
  ],
  ids=["byte-order mark", "CRLF", "no last line end", "tabs", "wide blanks", "leading zeros"],
)
def test_other_ways_to_write_the_same_histories(folder, content):
  (folder / "sequences.txt").write_bytes(content.encode())
  assert histories(load_directory(folder)) == {"ann": [0, 1, 2], "bob": [3, 2, 1, 0], "cy": [2, 2, 3]}


def test_items_may_be_plain_with_other_fields_and_without_title_or_id(folder):
  (folder / "items.jsonl.gz").unlink()
  lines = ['{"asin": "x"}', '{"title": null}', '{"title": "T", "id": 2}', "{}"]
  (folder / "items.jsonl").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
  assert load_directory(folder).titles == ("", "", "T", "")


def test_items_may_have_ids_of_their_own(folder):
  (folder / "items.jsonl.gz").unlink()
  names = ["B00x7", "a b", "0", "Ж"]
  (folder / "items.jsonl").write_text("".join(json.dumps({"id": name}) + "\n" for name in names))
  dataset = load_directory(folder)
  assert dataset.item_ids.to_json() == names
  assert histories(dataset)["bob"] == [3, 2, 1, 0], "sequences.txt has the lines of the items"


@pytest.mark.parametrize(
  ("ids", "parts"),
  [
    (["a", "b", "a", "c"], ["line 3 field 'id'", "got 'a' again (first on line 1)"]),
    (["a", "b", 2, "c"], ["line 3 field 'id'", "for all items or for none"]),
    ([0, "b", "c", "d"], ["line 2 field 'id'", "for all items or for none"]),
    (["a", "b", None, "d"], ["line 3 field 'id'", "for all items or for none"]),
    ([0, 2, 1, 3], ["line 2 field 'id'", "expected 1", "write ids of your own as strings"]),
    ([0, 1.0, 2, 3], ["line 2 field 'id'", "got '1.0'"]),
    ([False, 1, 2, 3], ["line 1 field 'id'", "got 'false'"]),
    (["a", "", "c", "d"], ["line 2 field 'id'", "whole characters on one line"]),
    (["a", "b\nc", "c", "d"], ["line 2 field 'id'", "whole characters on one line"]),
    (["a", "\ud800", "c", "d"], ["line 2 field 'id'", "whole characters on one line"]),
    (["a", "b" * 257, "c", "d"], ["line 2 field 'id'", "at most 256 bytes"]),
  ],
)
def test_wrong_ids_of_items(folder, ids, parts):
  (folder / "items.jsonl.gz").unlink()
  (folder / "items.jsonl").write_text("".join(json.dumps({"id": one}) + "\n" for one in ids))
  refusal(folder, "items.jsonl", *parts)


def test_new_items_count_on_or_have_ids_of_their_own(tmp_path):
  known = ItemIds.numbered(3)
  assert read_new_items(tmp_path, known, count=2)[0].to_json() == [0, 1, 2, 3, 4]
  (tmp_path / "items.jsonl").write_text('{"id": 3, "title": "T"}\n{}\n')
  item_ids, titles = read_new_items(tmp_path, known, count=2)
  assert (item_ids.to_json(), titles) == ([0, 1, 2, 3, 4], ("T", ""))
  (tmp_path / "items.jsonl").write_text('{"id": "x"}\n{"id": "y"}\n')
  assert read_new_items(tmp_path, known, count=2)[0].to_json() == ["0", "1", "2", "x", "y"]
  with pytest.raises(InputError, match=r"expected items\.jsonl to have 3 lines, one for each row, got 2"):
    read_new_items(tmp_path, known, count=3)


def test_user_labels_may_be_any_utf8(folder):
  (folder / "sequences.txt").write_text("žofie 0 1 2\n-3.5 1 2 3\n")
  assert list(histories(load_directory(folder))) == ["žofie", "-3.5"]


def test_ids_of_users_may_stand_in_a_file_of_their_own(folder):
  (folder / "users.txt").write_text("Ann Lee\n7\n žofie\n")
  assert list(histories(load_directory(folder)).items()) == [
    ("Ann Lee", [0, 1, 2]), ("7", [3, 2, 1, 0]), (" žofie", [2, 2, 3]),
  ]  # fmt: skip


@pytest.mark.parametrize(
  ("users", "parts"),
  [
    ("ann\nbob\n", ["expected 3 lines, one for each line of sequences.txt, got 2"]),
    ("ann\nbob\nann\n", ["line 3", "each once, got 'ann' again (first on line 1)"]),
    ("ann\n\nbob\n", ["line 2", "got a blank line"]),
    ("ann\n\u2028\nbob\n", ["line 2", "got a blank line"]),
    ("ann\n\x1c\nbob\n", ["line 2", "got a blank line"]),
    ("ann\n" + "b" * 257 + "\ncy\n", ["line 2", "at most 256 bytes, got 257"]),
  ],
)
def test_bad_ids_of_users_are_refused(folder, users, parts):
  (folder / "users.txt").write_text(users, newline="\n")
  refusal(folder, str(folder / "users.txt"), *parts)


@pytest.mark.parametrize(
  ("sequences", "parts"),
  [
    ("ann 0 1 2\n\nbob 1 2 3\n", ["line 2", "expected 'user item item ...'", "got ''", "remove the line"]),
    ("ann 0 1 2\n   \nbob 1 2 3\n", ["line 2", "got '   '"]),
    ("ann 0 1 2\nbob\n", ["line 2", "got 'bob'", "give the user items"]),
    ("ann 0 1 2\n 0 1 2\n", ["line 2", "got ' 0 1 2'"]),
    ("ann 0 1 2\nbob 1 3.0 2\n", ["line 2 field 3", "expected an item id, an integer in 0..3", "got '3.0'"]),
    (
      "ann 0 1 2\nbob 1 2 B00x7\n",
      ["line 2 field 4", "got 'B00x7'", "number the items from 0", "--config.data.source=recbole"],
    ),
    ("ann 0 " + "0" * 5000 + "1 7\n", ["line 1 field 4", "got '7'"]),
    ("ann 0 1 -2\n", ["line 1 field 4", "got '-2'"]),
    ("ann 0 +1 2\n", ["line 1 field 3", "got '+1'"]),
    ("ann 0,1,2\n", ["line 1 field 2", "got '0,1,2'", "separate them by blanks"]),
    ("ann 0 1 2\nbob 1 ٣ 2\n", ["line 2 field 3", "got '٣'"]),
    ("ann 0 1 2\nbob 3 4 0\n", ["line 2 field 3", "in 0..3", "got '4'", "from 0, or add the item to the items file"]),
    ("ann 0 1 99999999999999999999\n", ["line 1 field 4", "got '99999999999999999999'"]),
    ("ann 0 1 4294967296\n", ["line 1 field 4", "got '4294967296'"]),
    ("ann 0 1 " + "z" * 9999 + "\n", ["line 1 field 4", "zzz...'"]),
    (
      "ann 0 1 2\nbob 1 2 3\nann 1 2 3\n",
      ["line 3 field 1", "each user on one line", "'ann' again", "first on line 1"],
    ),
    ("", ["expected at least one user", "found none"]),
    ("ann,0,1,2\n", ["line 1", "expected 'user item item ...'", "separate them by blanks instead of commas"]),
    ("ann;0;1;2\n", ["line 1", "separate them by blanks instead of semicolons"]),
    ("ann\t\n", ["line 1", "give the user items or remove the line"]),
  ],
)
def test_bad_histories_are_refused(folder, sequences, parts):
  (folder / "sequences.txt").write_text(sequences)
  refusal(folder, str(folder / "sequences.txt"), *parts)


@pytest.mark.parametrize(
  ("content", "parts"),
  [
    (b"ann 0 1 2\nb\xff 1 2 3\n", ["line 2", "expected UTF-8 text", "got byte 0xff"]),
    (SEQUENCES.encode("utf-16"), ["line 1", "expected UTF-8 text", "save the file as UTF-8"]),
  ],
  ids=["latin-1", "utf-16"],
)
def test_histories_that_are_not_utf8_are_refused(folder, content, parts):
  (folder / "sequences.txt").write_bytes(content)
  refusal(folder, str(folder / "sequences.txt"), *parts)


def compressed(content):
  """Without the second it was made in: xdist's workers must find tests of the same names."""
  return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
  ("content", "parts"),
  [
    (compressed(b""), ["expected at least one item", "empty file"]),
    (compressed(b"{}\n{,}\n"), ["line 2", "expected a JSON object", "got '{,}'", "one object a line"]),
    (compressed(b"{}\n\n{}\n"), ["line 2", "expected a JSON object", "got ''"]),
    (compressed(b"{}\n[1]\n"), ["line 2", "expected a JSON object", "got '[1]'"]),
    (compressed(b"[" * 100_000), ["line 1", "expected a JSON object"]),
    (compressed(b'{"id": 0}\n{"id": 2}\n'), ["line 2 field 'id'", "expected 1", "got '2'", "sort the file"]),
    (compressed(b'{"title": ["a"]}\n'), ["line 1 field 'title'", "expected a string", "got list"]),
    (compressed(b'{"title": 0}\n'), ["line 1 field 'title'", "expected a string", "got '0'"]),
    (compressed(b'{}\n{"title": "a\\ud800"}\n'), ["line 2 field 'title'", "whole characters", "ud800"]),
    (compressed(b"{}\n\xef\xbb\xbf{}\n"), ["line 2", "expected a JSON object"]),
    (compressed(b'{}\n{"title": "\xe9"}\n'), ["line 2", "expected UTF-8 text", "0xe9"]),
    (b"{}\n{}\n", ["expected gzip", "corrupt or cut-off"]),
    (compressed(ITEMS.encode())[:-12], ["expected gzip", "corrupt or cut-off"]),
    (compressed(ITEMS.encode())[:20] + b"\xff" * 30, ["expected gzip", "corrupt or cut-off"]),
    (b"", ["expected at least one item"]),
  ],
)
def test_bad_items_are_refused(folder, content, parts):
  (folder / "items.jsonl.gz").write_bytes(content)
  refusal(folder, str(folder / "items.jsonl.gz"), *parts)


@pytest.mark.parametrize(
  ("remove", "parts"),
  [
    (["sequences.txt"], ["expected sequences.txt", "found no such file"]),
    (["items.jsonl.gz"], ["expected one of items.jsonl.gz and items.jsonl", "found neither", "{} is enough"]),
  ],
  ids=["sequences", "items"],
)
def test_missing_files_are_named(folder, remove, parts):
  for name in remove:
    (folder / name).unlink()
  refusal(folder, str(folder), *parts)


def test_two_items_files_are_refused(folder):
  (folder / "items.jsonl").write_text(ITEMS)
  refusal(folder, "expected one of", "found both; remove one")


def test_an_unknown_modality_is_refused_with_those_found(folder):
  refusal(folder, str(folder), "image, text", "got 'video'", modalities=("text", "video"))


def test_features_of_another_catalogue_are_refused(folder):
  np.save(folder / "text_features.npy", TEXT[:3])
  refusal(folder, str(folder / "text_features.npy"), "expected 4 rows", "got 3")


def test_a_recbole_folder_is_recognised(folder):
  (folder / "sequences.txt").unlink()
  (folder / "x.inter").write_text("user_id:token\titem_id:token\n")
  refusal(folder, "expected sequences.txt", "--config.data.source=recbole")


@pytest.mark.parametrize(
  ("name", "parts"),
  [
    ("", ["no data folder was given", "--config.data.path=DIR"]),
    ("nowhere", ["nowhere", "expected a folder", "found nothing", "--config.data.path=DIR"]),
    (__file__, [__file__, "expected a folder", "found a file"]),
  ],
  ids=["empty", "missing", "file"],
)
def test_what_is_no_folder_is_refused(name, parts):
  settings = SimpleNamespace(
    source="directory", path=name, modalities=(), drop_short_users=False, drop_incomplete_items=False
  )
  with pytest.raises(InputError) as error:
    load(settings)
  assert all(part in str(error.value) for part in parts)


def test_blank_lines_at_the_end_are_none(folder):
  expected = load_directory(folder)
  (folder / "sequences.txt").write_text(SEQUENCES + "\n \t\n")
  (folder / "items.jsonl.gz").write_bytes(gzip.compress((ITEMS + "\n\n").encode()))
  found = load_directory(folder)
  assert histories(found) == histories(expected)
  assert found.titles == expected.titles


def test_load_does_what_the_settings_say(folder):
  (folder / "sequences.txt").write_text(SEQUENCES + "dee 1\n")
  settings = SimpleNamespace(
    source="directory", path=str(folder), modalities=("text",), drop_short_users=True, drop_incomplete_items=False
  )
  dataset = load(settings)
  assert dataset.modalities == ("text",)
  assert dataset.interactions.users.tolist() == ["ann", "bob", "cy"]
  settings.drop_short_users = False
  assert load(settings).interactions.users.tolist() == ["ann", "bob", "cy", "dee"]
  (folder / "sequences.txt").write_text("dee 1\n")
  settings.drop_short_users = True
  with pytest.raises(InputError, match="without the users that have fewer than 3 interactions: expected at least one"):
    load(settings)


def test_incomplete_items_and_what_was_done_with_them_are_dropped(folder):
  (folder / "sequences.txt").write_text("ann 0 1 2\nbob 3 2 1 0\ncy 2 2 3\n")
  settings = SimpleNamespace(
    source="directory", path=str(folder), modalities=(), drop_short_users=True, drop_incomplete_items=True
  )
  dataset = load(settings)  # Item 1 has no image; ann is left with two interactions.
  assert histories(dataset) == {"bob": [2, 1, 0], "cy": [1, 1, 2]}
  assert dataset.titles == ("A", "Ć", "D")
  assert dataset.item_ids.to_json() == [0, 2, 3]
  np.testing.assert_array_equal(dataset.features["text"], TEXT[[0, 2, 3]])
  np.testing.assert_array_equal(dataset.features["image"], IMAGE[[0, 2, 3]])
  assert all(mask.all() for mask in dataset.present.values())


def test_users_that_incomplete_items_leave_nothing_of_are_gone(folder):
  settings = SimpleNamespace(
    source="directory", path=str(folder), modalities=(), drop_short_users=False, drop_incomplete_items=True
  )
  (folder / "sequences.txt").write_text("ann 1\nbob 0 2 3 0\ncy 1 2\n")  # Item 1 has no image.
  assert histories(load(settings)) == {"bob": [0, 1, 2, 0], "cy": [1]}
  (folder / "sequences.txt").write_text("ann 1\n")
  with pytest.raises(InputError, match="without the items that lack a modality: expected at least one user"):
    load(settings)


def test_a_catalogue_without_a_complete_item_is_refused(folder):
  np.save(folder / "has_text.npy", np.array([0, 1, 0, 0]))
  with pytest.raises(InputError, match=r"items with every one of image, text, found none"):
    complete_items(load_directory(folder))


def test_statistics_against_counts_by_hand(folder):
  dataset = load_directory(folder)
  split = leave_one_out(dataset.interactions)
  figures = statistics(dataset, split)
  assert figures["split_hash"] == split.split_hash
  assert len(figures.pop("features_hash")) == 16
  assert len(figures.pop("ids_hash")) == 16
  assert len(figures.pop("titles_hash")) == 16
  assert figures.pop("split") == "leave-one-out"
  del figures["split_hash"]
  assert figures == {
    "name": folder.name,
    "source": str(folder),
    "users": 3,
    "items": 4,
    "interactions": 10,
    "history_length": {"mean": pytest.approx(10 / 3), "median": 3.0, "min": 3, "max": 4},
    "density": pytest.approx(10 / 12),
    "short_users": 0,
    "head_share": 0.4,  # Item 2, of 4 items, holds 4 of 10 interactions.
    "unseen_items": 1,  # Training is ann 0, bob 3 2, cy 2.
    "modalities": {"image": {"width": 3, "coverage": 0.75}, "text": {"width": 2, "coverage": 1.0}},
    "notes": ["histories ordered as in the file, without timestamps"],
    "times_hash": None,
  }
  json.dumps(figures)


def test_the_hash_of_times_changes_with_any_of_them_and_no_other_hash_does(folder):
  found = []
  for times in ("ann 1 2 3\nbob 0 1 2 3\ncy 1 2 3\n", "ann 1 2 3\nbob 0 1 2 3\ncy 1 2 4\n"):
    (folder / "timestamps.txt").write_text(times)
    dataset = load_directory(folder)
    figures = statistics(dataset, leave_one_out(dataset.interactions))
    found.append([figures[name] for name in ("times_hash", "split_hash", "features_hash")])
  assert found[0][0] != found[1][0]
  assert found[0][1:] == found[1][1:]


def test_statistics_as_text_name_the_data(folder):
  dataset = load_directory(folder)
  split = leave_one_out(dataset.interactions)
  text = format_statistics(statistics(dataset, split))
  for part in (f"{folder.name} from {folder}", "3 users, 4 items, 10 interactions", "image: width 3, 75.0%"):
    assert part in text
  assert split.split_hash in text
  assert "synthetic" not in text


def test_files_that_are_not_read_are_named_in_one_note(folder):
  def text(**options):
    dataset = load_directory(folder, **options)
    return format_statistics(statistics(dataset, leave_one_out(dataset.interactions)))

  assert "not used" not in text()
  assert "  histories ordered as in the file" in text()
  (folder / "timestamp.txt").write_text(TIMES)
  np.save(folder / "image.npy", IMAGE)
  np.save(folder / "text_feature\n.npy", TEXT)
  note = "  not used: image.npy, text_feature .npy, timestamp.txt (read are NAME_features.npy, has_NAME.npy,"
  assert f"{note} sequences.txt, timestamps.txt, users.txt)\n" in text()
  assert "not used: image.npy, image_features.npy, text" in text(modalities=["text"])
  for number in range(20):
    (folder / f"about_{number:02d}.txt").write_text("")
  assert "not used: about_00.txt, about_01.txt" in text()
  assert "about_09.txt and 13 more (read are" in text()
  (folder / "timestamps.txt").write_text(TIMES)
  assert "  histories ordered by timestamp\n" in text()


def test_a_folder_may_have_no_features(folder):
  for name in ("text", "image"):
    (folder / f"{name}_features.npy").unlink()
  settings = SimpleNamespace(
    source="directory", path=str(folder), modalities=(), drop_short_users=False, drop_incomplete_items=True
  )
  dataset = load(settings)  # An item lacks none of no modalities.
  assert (dataset.modalities, dataset.num_items) == ((), 4)
  figures = statistics(dataset, leave_one_out(dataset.interactions))
  assert figures["modalities"] == {}
  assert format_statistics(figures).endswith(f"leave-one-out split {figures['split_hash']}, no features")


REAL = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.mark.parametrize(
  ("name", "users", "items", "interactions", "widths", "longest"),
  [
    ("amazon18_scientific", 8_317, 4_344, 58_492, {"attribute": 64, "text": 384}, 78),
    ("amazon14_beauty", 22_363, 12_101, 198_502, {"attribute": 64, "text": 384}, 204),
    ("ml100k_posters", 943, 1_682, 100_000, {"image": 1280, "text": 384}, 737),
  ],
)
def test_real_folders_hold_what_they_are_known_to(name, users, items, interactions, widths, longest):
  if not (REAL / name).is_dir():
    pytest.skip("the real data is not here")
  dataset = load_directory(REAL / name)
  figures = statistics(dataset, leave_one_out(dataset.interactions))
  assert (figures["users"], figures["items"], figures["interactions"]) == (users, items, interactions)
  assert {name: modality["width"] for name, modality in figures["modalities"].items()} == widths
  assert figures["history_length"]["max"] == longest
  if name == "ml100k_posters":
    assert figures["modalities"]["image"]["coverage"] == pytest.approx(0.847, abs=5e-4)
    assert dataset.titles[0] == "Toy Story"


TIMES = "ann 5 5 9.5\nbob 0 1 2 3\ncy -7 0 1e9\n"


def test_timestamps_stand_beside_the_items(folder):
  assert load_directory(folder).interactions.times is None
  (folder / "timestamps.txt").write_text(TIMES)
  np.testing.assert_array_equal(load_directory(folder).interactions.times, [5, 5, 9.5, 0, 1, 2, 3, -7, 0, 1e9])


@pytest.mark.parametrize(
  ("times", "parts"),
  [
    ("ann 5 5 9\nbob 0 1 2 3\n", ["expected 3 lines", "got 2", "same users"]),
    ("ann 5 5 9\ncy 0 1 2\nbob 1 2 3 4\n", ["line 2 field 1", "expected user 'bob'", "got 'cy'"]),
    ("ann 5 5\nbob 0 1 2 3\ncy 1 2 3\n", ["line 1", "expected 3 times", "got 2"]),
    ("ann 5 4 9\nbob 0 1 2 3\ncy 1 2 3\n", ["line 1", "in time order", "sort the history"]),
    ("ann 5 5 x\nbob 0 1 2 3\ncy 1 2 3\n", ["line 1", "expected finite numbers"]),
    ("ann 5 5 9\nbob 0 1 2 inf\ncy 1 2 3\n", ["line 2", "expected finite numbers"]),
    ("ann 5 5 9\nbob 0 1 2 3\ncy 1 2 3_0\n", ["line 3", "expected finite numbers"]),
    ("ann 5 5 9\nbob 0 1 nan 3\ncy 1 2 3\n", ["line 2", "expected finite numbers"]),
  ],
)
def test_bad_timestamps_are_refused(folder, times, parts):
  (folder / "timestamps.txt").write_text(times)
  refusal(folder, "timestamps.txt", *parts)
