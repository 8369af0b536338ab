"""Data in memory: whatever gives its columns by name is read, ids stay what they are, and what is wrong is named."""

import numpy as np
import pyarrow
import pytest
from numpy.testing import assert_array_equal

from bbqrec_jax.data.directory import load_directory
from bbqrec_jax.data.tables import load_data
from bbqrec_jax.errors import InputError

USERS = ["b", "a", "b", "a", "b", "a", "a"]
ITEMS = ["x", "y", "z", "x", "y", "z", "y"]
TIMES = [3.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0]


def table(**columns):
  return {"user": USERS, "item": ITEMS, "time": TIMES} | columns


def history(data, user):
  (row,) = np.flatnonzero(data.interactions.users == user)
  return [data.item_ids[item] for item in data.interactions.history(row)]


@pytest.mark.parametrize("kind", ["dictionary", "pyarrow", "pandas", "polars", "LazyFrame"])
def test_tables_of_any_library_are_read(kind):
  make = {"dictionary": dict, "pyarrow": pyarrow.table}.get(kind)
  if kind == "LazyFrame":
    make = pytest.importorskip("polars").LazyFrame
  make = make or pytest.importorskip(kind).DataFrame
  data = load_data(interactions=make(table()), items=make({"id": ["x", "y", "z"], "title": ["X", None, "Z"]}))
  assert data.interactions.users.tolist() == ["b", "a"]
  assert history(data, "b") == ["z", "y", "x"]
  assert history(data, "a") == ["y", "x", "z", "y"], "equal times stay as in the table"
  assert data.titles == ("X", "", "Z")
  assert_array_equal(data.interactions.times, [1, 2, 3, 1, 2, 3, 3])


def test_without_times_and_items_the_order_is_that_of_the_table():
  columns = table()
  del columns["time"]
  data = load_data(interactions=columns)
  assert history(data, "b") == ["x", "z", "y"]
  assert data.item_ids.to_json() == ["x", "y", "z"]
  assert data.interactions.times is None


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_dates_are_seconds(unit):
  dates = (np.array(TIMES) + 1e9).astype("datetime64[s]").astype(f"datetime64[{unit}]")
  data = load_data(interactions=table(time=dates))
  assert_array_equal(data.interactions.times, np.array([1, 2, 3, 1, 2, 3, 3]) + 1e9)


def test_numbered_items_keep_their_numbers_and_their_features():
  items = [30, 10, 20]
  named = dict(zip("xyz", items, strict=True))
  features = {"text": np.eye(3, 2) + 5, "image": np.array([[0, 0], [1, 2], [3, 4]])}
  data = load_data(
    interactions=table(item=[named[item] for item in ITEMS]),
    items={"id": items, "title": ["x", "y", "z"]},
    features=features,
  )
  assert data.item_ids.to_json() == [10, 20, 30]
  assert data.titles == ("y", "z", "x")
  assert history(data, "b") == [20, 10, 30]
  assert_array_equal(data.features["text"], features["text"][[1, 2, 0]])
  assert_array_equal(data.present["image"], [True, True, False])


def test_a_mask_says_who_has_a_modality():
  features = {"text": np.array([[np.nan, 1], [1, 1], [2, 2]])}
  data = load_data(interactions=table(), items={"id": list("xyz")}, features=features,
                   present={"text": np.array([False, True, True])})  # fmt: skip
  assert_array_equal(data.present["text"], [False, True, True])


ROWS = {"id": ["x", "y", "z"]}


@pytest.mark.parametrize(
  ("given", "said"),
  [
    ({}, "expected a folder or interactions, got neither"),
    ({"interactions": {"user": USERS}}, "interactions: expected a column 'item'"),
    ({"interactions": table(user=["a", None, *USERS[2:]])}, "interactions row 1 column 'user': expected an id"),
    ({"interactions": table(item=[0.0, 1.0, *range(5)])}, "interactions row 0 column 'item': expected an id"),
    ({"interactions": table(user=USERS[:3])}, "3 users and 7 items"),
    ({"interactions": table(time=[1, 2, 3, 4, 5, float("nan"), 7])}, "interactions row 5 column 'time'"),
    ({"interactions": table(time=["soon"] * 7)}, "interactions row 0 column 'time'"),
    ({"interactions": {"user": [], "item": []}}, "interactions: expected at least one row"),
    ({"interactions": table(), "items": {"id": ["x", "y"]}}, "interactions row 2 column 'item': .*got 'z'"),
    ({"interactions": table(), "items": {"id": ["x", "y", "z", "x"]}}, "items row 3 column 'id': expected each item"),
    ({"interactions": table(), "features": {"text": np.ones((3, 2))}}, "expected items .* beside features"),
    ({"items": ROWS, "features": {"text": np.ones((2, 2))}}, r"features\['text'\]: expected numbers \[3, width\]"),
    ({"items": ROWS, "features": {"text": np.ones(3)}}, r"features\['text'\]: expected numbers \[3, width\]"),
    ({"items": ROWS, "features": {"text": [[1, 2], [3, np.inf], [0, 0]]}}, r"features\['text'\] row 1: expected"),
    ({"items": ROWS, "features": {"text": np.zeros((3, 2))}}, "expected features of some items, got none"),
    ({"items": ROWS, "features": {"fused": np.ones((3, 2))}}, "expected a modality's name"),
    ({"items": ROWS, "present": {"text": np.ones(3, bool)}}, "expected the modalities of features"),
    ({"items": ROWS, "features": {"text": np.ones((3, 2))}, "present": {"text": [1, 1, 1]}}, r"expected \[3\] bool"),
  ],
)  # fmt: skip
def test_what_is_wrong_is_named(given, said):
  given = {"interactions": table()} | given if given else given
  with pytest.raises(InputError, match=said):
    load_data(**given)


def test_a_folder_is_read_as_its_kind(tmp_path):
  (tmp_path / "sequences.txt").write_text("a 0 1 0\n")
  (tmp_path / "items.jsonl").write_text("{}\n{}\n")
  assert load_data(tmp_path).interactions.items.tolist() == load_directory(tmp_path).interactions.items.tolist()
  with pytest.raises(InputError, match="got both"):
    load_data(tmp_path, interactions=table())
