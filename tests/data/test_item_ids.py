"""Items' own ids: text in, rows inside, the same ids out."""

import json
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from numpy.testing import assert_array_equal

from bbqrec_jax.commands.recommend import check_options
from bbqrec_jax.data.histories import read_histories
from bbqrec_jax.data.item_ids import ItemIds, split_ids
from bbqrec_jax.data.titles import find_titles, listed_items, require_titles
from bbqrec_jax.errors import InputError

NAMES = ItemIds(["sku-1", "7", "007", "a b", "Ж"])
GAPS = ItemIds(np.array([0, 2, 5, 100]))
KINDS = [NAMES, GAPS, ItemIds.numbered(4)]


@pytest.mark.parametrize("ids", KINDS)
def test_every_id_leads_to_its_row_and_back(ids):
  text = [str(ids[row]) for row in range(len(ids))]
  assert_array_equal(ids.rows(text), np.arange(len(ids)))
  again = ItemIds.from_json(json.loads(json.dumps(ids.to_json())))
  assert (again.to_json(), again.digest) == (ids.to_json(), ids.digest)
  assert [type(one) for one in again.to_json()] == [type(ids[0])] * len(ids)


def test_numbers_are_told_by_value_and_names_by_letter():
  assert_array_equal(GAPS.rows(["5", "005", "1", "3", "101", "-5", "5.0", "", "x", "9" * 40, "٥"]), [2, 2] + 9 * [-1])
  assert_array_equal(NAMES.rows(["7", "007", "07", "SKU-1", "a", "ж"]), [1, 2, -1, -1, -1, -1])


@pytest.mark.parametrize("ids", KINDS)
def test_what_is_kept_keeps_its_id(ids):
  kept = np.arange(len(ids)) % 2 == 0
  assert ids.keep(kept).to_json() == ids.to_json()[::2]
  assert ids.keep(kept).digest != ids.digest
  assert not ids.keep(kept).are_rows


@pytest.mark.parametrize(
  ("ids", "unknown", "said"),
  [
    (ItemIds.numbered(4), "4", "from 0 to 3"),
    (GAPS, "1", "drop_incomplete_items"),
    (NAMES, "sku-2", "the nearest are 'sku-1'"),
    (NAMES, "qqqqqq", "written like 'sku-1'"),
  ],
)
def test_an_unknown_id_is_told_what_there_is(ids, unknown, said):
  with pytest.raises(InputError) as error:
    ids.require([str(ids[0]), unknown], where=lambda place: f"here {place}")
  assert str(error.value).startswith(f"here 1: expected the id of an item, got {unknown!r}; ")
  assert said in str(error.value)


@pytest.mark.parametrize(
  "values", [None, "ab", {}, [1, "a"], [1, 2.5], [True, False], [2**63], [3, 3], [3, 1], ["a", "a"], ["a\nb"], [""],
             ["\ud800"], [None]]
)  # fmt: skip
def test_what_are_no_ids_is_refused(values):
  with pytest.raises(ValueError, match="item ids"):
    ItemIds.from_json(values)


def test_new_numbers_count_on_and_new_names_must_be_given():
  assert ItemIds.numbered(3).extended(None, 2, where="new").to_json() == [0, 1, 2, 3, 4]
  for ids in (NAMES, GAPS):
    with pytest.raises(InputError, match=r"new: expected items\.jsonl with the ids of the 2 new items"):
      ids.extended(None, 2, where="new")
  assert GAPS.extended(ItemIds(["x", "6"]), 2, where="new").to_json() == ["0", "2", "5", "100", "x", "6"]
  with pytest.raises(InputError, match="got '5' in row 1, which is known already"):
    GAPS.extended(ItemIds(["x", "5"]), 2, where="new")


def test_ids_with_commas_stand_in_quotes():
  assert split_ids('a, "b,c",d e ,"say ""x"""') == ["a", "b,c", "d e", 'say "x"']
  assert split_ids("") == [""]


@pytest.mark.parametrize(
  ("name", "content", "histories"),
  [
    ("h.txt", "ann sku-1 7\nbob Ж\n", {"ann": [0, 1], "bob": [4]}),
    (
      "h.jsonl",
      '{"user": "a n", "items": ["a b", 7]}\n{"user": 5, "items": ["sku-1"], "more": 1}\n',
      {"a n": [3, 1], "5": [0]},
    ),
  ],
)
def test_histories_are_read_by_the_ids_of_the_data(tmp_path, name, content, histories):
  path = tmp_path / name
  path.write_text(content, encoding="utf-8")
  found = read_histories(path, NAMES)
  assert {str(user): found.history(row).tolist() for row, user in enumerate(found.users)} == histories
  assert found.items.dtype == np.int32


@pytest.mark.parametrize(
  ("columns", "says"),
  [
    ({"user": ["u"], "items": [["sku-1", "nope"]]}, "line 1 item 2.*'nope'"),
    ({"user": ["u"], "items": [[]]}, "line 1: expected a user and a list"),
    ({"user": ["u", "u"], "items": [["7"], ["7"]]}, "line 2 field 'user'.*again"),
    ({"user": ["u"], "item": ["7"]}, "expected columns user and items"),
  ],
)
def test_histories_in_parquet_are_read_or_refused(tmp_path, columns, says):
  path = tmp_path / "h.parquet"
  pyarrow.parquet.write_table(pyarrow.table({"user": ["a n", "5"], "items": [["a b", "7"], ["sku-1"]]}), path)
  assert read_histories(path, NAMES).items.tolist() == [3, 1, 0]
  pyarrow.parquet.write_table(pyarrow.table(columns), path)
  with pytest.raises(InputError, match=says):
    read_histories(path, NAMES)


def test_what_is_no_table_of_histories_in_parquet_is_refused(tmp_path):
  path = tmp_path / "h.parquet"
  items = pyarrow.array([["7"]])
  not_utf8 = pyarrow.table({"user": pyarrow.array([b"\xff"]).view(pyarrow.string()), "items": items})
  for table in (not_utf8, pyarrow.table([["u"], ["v"], items], ["user", "user", "items"])):
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(InputError, match="expected a Parquet file, could not"):
      read_histories(path, NAMES)
  path.write_bytes(b"PAR1")
  with pytest.raises(InputError, match="Parquet"):
    read_histories(path, NAMES)


def test_titles_are_found_by_words_in_any_order():
  titles = ["Red mug, large", "Red mug", "", "Blue oak table", "Oak table"]
  assert find_titles("RED MUG", titles, count=2)[0][0] == 1
  assert find_titles("mug large red", titles)[0][0] == 0
  assert find_titles("blue okk table", titles)[0][0] == 3
  assert find_titles(" ?", titles) == []
  assert require_titles('"red mug, large",oak tabel', titles, flag="--titles").tolist() == [0, 4]
  with pytest.raises(InputError, match=r"--titles.*'garden hose'; the most alike are"):
    require_titles("garden hose", titles, flag="--titles")
  with pytest.raises(InputError, match="has none"):
    require_titles("x", ["", ""], flag="--titles")


def test_rows_that_were_left_out_shift_no_number(tmp_path):
  (tmp_path / "h").write_text("u 0 5 100\n")
  assert read_histories(tmp_path / "h", GAPS).items.tolist() == [0, 2, 3]


@pytest.mark.parametrize(
  ("name", "content", "parts"),
  [
    ("h", "u sku-1\nv 7 sku-3\n", ["line 2 field 3", "'sku-3'", "'sku-1'"]),
    ("h", "", ["expected a line a user"]),
    ("h", "u sku-1\nu 7\n", ["line 2 field 1", "first on line 1"]),
    ("h.jsonl", '{"user": "u", "items": ["sku-1", "nope"]}\n', ["line 1 item 2", "'nope'"]),
    ("h.jsonl", '{"user": "u", "items": []}\n', ["line 1", "at least one item"]),
    ("h.jsonl", '{"user": "u", "items": "7"}\n', ["line 1", '{"user": id, "items": [id, ...]}']),
    ("h.jsonl", '{"user": "u", "items": [7.0]}\n', ["line 1", "strings or integers"]),
    ("h.jsonl", '{"user": true, "items": [7]}\n', ["line 1", "strings or integers"]),
    ("h.jsonl", "[]\n", ["line 1"]),
    ("h.jsonl", "u sku-1\n", ["line 1", "got 'u sku-1'"]),
    ("h.jsonl", '{"user": 1, "items": [7]}\n{"user": "1", "items": [7]}\n', ["line 2 field 'user'", "again"]),
  ],
)
def test_bad_histories_are_one_line(tmp_path, name, content, parts):
  (tmp_path / name).write_text(content)
  with pytest.raises(InputError) as error:
    read_histories(tmp_path / name, NAMES)
  assert str(tmp_path / name) in str(error.value)
  assert all(part in str(error.value) for part in parts), str(error.value)


def test_the_nearest_ids_are_those_that_differ_by_case_alone():
  ids = ItemIds([f"SKU-{number:03d}" for number in range(100)])
  with pytest.raises(InputError, match="nearest are 'SKU-010'"):
    ids.require(["sku-010"], where=lambda place: "entry 1")


def test_nothing_may_be_sold_out_but_something_is_allowed(tmp_path):
  (tmp_path / "none.txt").write_text("\n")
  assert listed_items(f"@{tmp_path / 'none.txt'}", NAMES, flag="--deny").tolist() == []
  with pytest.raises(InputError, match="got an empty file"):
    listed_items(f"@{tmp_path / 'none.txt'}", NAMES, flag="--allow")


def test_recommendations_are_not_called_what_they_are_not(tmp_path):
  options = {"top": 1, "history": None, "titles": None, "user": None, "histories": "h", "times": None}
  options |= {"timestamps": None, "output": tmp_path / "x.jsonl.gz"}
  with pytest.raises(InputError, match=r"got \.gz; leave \.gz away"):
    check_options(types.SimpleNamespace(**options))
