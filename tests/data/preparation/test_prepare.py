"""A shop as people have it (a log, a product table, pictures) becomes a data set that knows everything by their ids."""

import csv
import gzip
import json
import pathlib

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import bbqrec_jax
from bbqrec_jax.data.directory import load_directory
from bbqrec_jax.data.interactions import leave_one_out
from bbqrec_jax.data.preparation import card
from bbqrec_jax.data.preparation.prepare import prepare
from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.json_files import read_json

SHARED = pathlib.Path(__file__).parents[4] / "shared" / "data"
HEAD = ("customer", "sku", "ts", "stars")


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch, request):
  """Drawing takes longer than all else here; one test looks at what is drawn."""
  if request.function is not test_the_card_says_what_is_odd:
    monkeypatch.setattr(card, "_draw", lambda *given: None)


def make_log(*, users=40, items=12, seed=0):
  rng = np.random.default_rng(seed)
  rows = []
  for user in range(users):
    for step in range(rng.integers(3, 9)):
      time = 1_700_000_000_000 + 1000 * int(step * 60 + user)
      rows.append((f"user {user}", f"SKU-{(user + step) % items}", time, int(rng.integers(1, 6))))
  return [rows[place] for place in rng.permutation(len(rows))]


def write_csv(path, rows, head=HEAD):
  with open(path, "w", newline="", encoding="utf-8") as file:
    csv.writer(file).writerows([head, *rows])
  return path


def histories(data):
  ids = data.item_ids.to_json()
  return {
    str(user): [ids[item] for item in data.interactions.history(row)]
    for row, user in enumerate(data.interactions.users)
  }


def expected(rows):
  of = {}
  for user, item, *_ in sorted(rows, key=lambda row: row[2]):
    of.setdefault(user, []).append(item)
  return of


def test_a_log_alone_becomes_a_data_set(tmp_path):
  rows = make_log()
  report = prepare(write_csv(tmp_path / "log.csv", rows), tmp_path / "shop")
  data = load_directory(tmp_path / "shop")
  assert histories(data) == expected(rows)
  assert list(histories(data)) == list(dict.fromkeys(row[0] for row in rows)), "users as they first appear"
  assert data.interactions.times.min() == 1_700_000_000
  assert report["times"] == "milliseconds since 1970"
  assert report["split_hash"] == leave_one_out(data.interactions).split_hash
  assert not (tmp_path / "shop" / "quarantine.jsonl").exists()


def test_the_same_from_a_dataframe(tmp_path):
  pandas = pytest.importorskip("pandas")
  rows = make_log()
  prepare(write_csv(tmp_path / "log.csv", rows), tmp_path / "file")
  frame = pandas.DataFrame(rows, columns=HEAD)
  items = pandas.DataFrame({"id": [f"SKU-{n}" for n in range(12)], "title": [f"T {n}" for n in range(12)]})
  bbqrec_jax.prepare(frame, tmp_path / "frame")
  bbqrec_jax.prepare(frame, tmp_path / "with", items=items)
  for name in ("sequences.txt", "timestamps.txt", "users.txt", "items.jsonl.gz"):
    assert (tmp_path / "frame" / name).read_bytes() == (tmp_path / "file" / name).read_bytes()
  data = load_directory(tmp_path / "with")
  assert data.item_ids.to_json() == items["id"].tolist(), "the order of the item table"
  assert data.titles[3] == "T 3"
  assert histories(data) == expected(rows)


def test_items_get_all_that_the_table_says(tmp_path, capsys):
  table = [
    ("SKU-1", "Red mug", 'big,\n"red"', "Kilo", "Home > Mugs", "$4.50", "one.png"),
    ("SKU-0", "Blue mug", "", "", "", "ask", "http://shop.example/pictures/two.png?width=9"),
    ("SKU-3", "Long " + "x" * 20_000, "", "", "", "-3", "three.png"),
    ("SKU-99", "nobody's", "", "", "", "free", "none.png"),
    ("SKU-0", "again", "", "", "", "", ""),
  ]
  head = ("sku", "name", "description", "brand", "category", "price", "image")
  (tmp_path / "pictures" / "deep").mkdir(parents=True)
  for name in ("one.png", "two.png", "deep/SKU-2.jpg", "spare.png", "notes.txt"):
    (tmp_path / "pictures" / name).write_bytes(b"")
  log = write_csv(tmp_path / "log.csv", make_log(items=4))
  items = write_csv(tmp_path / "items.csv", table, head)
  prepare(log, tmp_path / "shop", items=items, images=tmp_path / "pictures", max_bad=0.5)
  with gzip.open(tmp_path / "shop" / "items.jsonl.gz", "rt") as file:
    records = [json.loads(line) for line in file]
  assert records[:2] == [
    {"id": "SKU-1", "title": "Red mug", "description": 'big, "red"', "brand": "Kilo", "category": "Home > Mugs",
     "price": 4.5, "image": "one.png"},
    {"id": "SKU-0", "title": "Blue mug", "image": "two.png"},
  ]  # fmt: skip
  by_id = {record["id"]: record for record in records}
  assert by_id["SKU-2"] == {"id": "SKU-2", "image": "deep/SKU-2.jpg"}
  assert set(by_id) == {f"SKU-{n}" for n in range(4)}
  assert set(by_id["SKU-3"]) == {"id", "title"}
  assert len(by_id["SKU-3"]["title"]) == 20_000
  report = read_json(tmp_path / "shop" / "preparation.json")
  assert report["quarantine"] == {"items.csv": {"an item id that came before": 1}}
  assert report["unused"] == {"items": 1, "pictures": 1}
  unread = {
    "prices that are no numbers": 2,
    "texts beyond 20,000 characters": 1,
    "pictures that are not in the folder": 1,
  }
  assert report["unread"] == unread, "of the items that are kept"
  assert read_json(tmp_path / "shop" / "card.json")["findings"]["not_taken_over"] == unread
  assert "2 prices that are no numbers are not taken over" in (tmp_path / "shop" / "card.html").read_text("utf-8")
  said = capsys.readouterr().out
  assert "items of the table without interactions: 1, left out" in said
  assert "pictures of no item that is kept: 1 of 4" in said
  assert "not taken over: 2 prices that are no numbers, such as 'ask' of 'SKU-0'" in said
  assert "not taken over: 1 pictures that are not in the folder, such as 'three.png' of 'SKU-3'" in said
  prepare(log, tmp_path / "all", items=items, max_bad=0.5, unseen_items=True)
  assert "SKU-99" in load_directory(tmp_path / "all").item_ids.to_json()
  with pytest.raises(InputError, match="unusable, got 1 of 5"):
    prepare(log, tmp_path / "none", items=items, max_bad=0.1)
  assert not (tmp_path / "none").exists()


def test_an_item_table_of_other_items_is_refused(tmp_path):
  log = write_csv(tmp_path / "log.csv", make_log())
  with pytest.raises(InputError, match=r"none of them"):
    prepare(log, tmp_path / "shop", items=write_csv(tmp_path / "items.csv", [("x", "y")], ("id", "title")))
  assert sorted(path.name for path in tmp_path.iterdir()) == ["items.csv", "log.csv"], "nothing is left behind"


def test_rows_that_cannot_be_used_are_told_one_by_one(tmp_path):
  good = make_log()
  bad = [("", "SKU-1", good[0][2], 1), ("user 1", " ", good[0][2], 1), ("user 1", "SKU-1", "soon", 1),
         ("user 1", "SKU-1", 0, 1), ("user 1", "x" * 300, good[0][2], 1), ("user 1", "SKU-1", good[0][2])]  # fmt: skip
  path = write_csv(tmp_path / "log.csv", [*good[:50], *bad, *good[50:]])
  prepare(path, tmp_path / "shop")
  lines = [json.loads(line) for line in (tmp_path / "shop" / "quarantine.jsonl").read_text().splitlines()]
  assert sorted(line["row"] for line in lines) == list(range(52, 58))
  reasons = {line["row"]: line["reason"] for line in lines}
  for row, words in zip(
    range(52, 58), ("no user", "no item", "neither", "magnitude", "300 bytes", "3 fields"), strict=True
  ):
    assert words.replace("300", "256") in reasons[row]
  assert histories(load_directory(tmp_path / "shop")) == expected(good)
  with pytest.raises(InputError, match=r"0\.001 of the rows to be unusable, got 6 of"):
    prepare(path, tmp_path / "other", max_bad=0.001)
  assert not (tmp_path / "other").exists()


def test_ratings_events_and_the_core_leave_out_what_they_say(tmp_path):
  rows = [(*row, "buy" if place % 3 else "view") for place, row in enumerate(make_log(users=80))]
  path = write_csv(tmp_path / "log.csv", rows, (*HEAD, "event"))
  report = prepare(path, tmp_path / "shop", min_rating=3, events="buy", min_per_user=3, min_per_item=5)
  kept = [row for row in rows if row[3] >= 3 and row[4] == "buy"]
  assert report["left_out"] == len(rows) - len(kept)
  found = histories(load_directory(tmp_path / "shop"))
  whole = expected(kept)
  counts = {}
  for user, items in found.items():
    assert [item for item in whole[user] if item in items] == items
    for item in items:
      counts[item] = counts.get(item, 0) + 1
  assert min(map(len, found.values())) >= 3
  assert min(counts.values()) >= 5
  with pytest.raises(InputError, match=r"got none \(rows that could be used.*min_per_user"):
    prepare(path, tmp_path / "none", min_per_user=50)


@pytest.mark.parametrize(
  ("settings", "says"),
  [({"user": "nobody"}, "--user"), ({"ties": "any"}, "--ties must be one of"), ({"min_per_user": 0}, "--min_per_user"),
   ({"usr": "x"}, "--usr is unknown"), ({"min_rating": 3, "rating": "none"}, "--rating"), ({"max_bad": 2.0}, "bad")],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(tmp_path, settings, says):
  path = write_csv(tmp_path / "log.csv", make_log())
  with pytest.raises(InputError, match=says):
    prepare(path, tmp_path / "shop", **settings)
  assert not (tmp_path / "shop").exists()


def test_the_card_says_what_is_odd(tmp_path):
  rows = [(user, item, 5 * (time // 300_000), stars) for user, item, time, stars in make_log(users=200)]
  rows += [(f"late {n}", item, 10, 1) for n in range(3) for item in ("SKU-1", "SKU-2", f"new <b>{n}")]
  table = [(f"SKU-{n}", f"The lamp {n % 2}" if n < 4 else f"Mug {n}", 5 + n) for n in range(12)]
  items = write_csv(tmp_path / "items.csv", table, ("id", "title", "price"))
  prepare(write_csv(tmp_path / "log.csv", rows), tmp_path / "shop", items=items, duplicates="keep")
  facts = read_json(tmp_path / "shop" / "card.json")
  odd = facts["findings"]
  data = load_directory(tmp_path / "shop")
  split = leave_one_out(data.interactions)
  unseen = set(split.test_target.tolist()) - set(split.train.items.tolist())
  assert odd["items_only_held_out"] == len(
    unseen | (set(split.validation_target.tolist()) - set(split.train.items.tolist()))
  )
  assert odd["items_like_another"] == 2
  assert odd["items_like_another_examples"][0] == ["SKU-0", "The lamp 0", "SKU-2", "The lamp 0"]
  assert odd["items_that_have"]["price"] == 12
  times = [
    data.interactions.times[a:b] for a, b in zip(data.interactions.offsets, data.interactions.offsets[1:], strict=False)
  ]
  assert odd["same_time_as_the_one_before"] == sum(int((np.diff(own) == 0).sum()) for own in times) > 0
  by_name = {one["name"]: one for one in facts["histograms"]}
  assert sum(by_name["history_length"]["counts"]) == data.interactions.num_users
  assert sum(by_name["item_popularity"]["counts"]) == data.num_items
  assert sum(by_name["time"]["counts"]) == data.interactions.num_interactions
  page = (tmp_path / "shop" / "card.html").read_text(encoding="utf-8")
  assert "<svg" in page
  assert "http" not in page.replace("http-equiv", ""), "nothing is fetched from elsewhere"
  assert "<b>0" not in page
  pytest.importorskip("matplotlib")
  assert (tmp_path / "shop" / "card" / "history_length.png").read_bytes().startswith(b"\x89PNG")


def test_histograms_count_every_value():
  values = np.array([0, 1, 2, 3, 4, 5, 8, 9, 1000])
  wide = card.counted("x", "x", values)
  assert wide.labels[:6] == ("0", "1", "2", "3–4", "5–8", "9–16")
  assert wide.counts[:6] == (1, 1, 1, 2, 2, 1)
  assert sum(wide.counts) == len(values)
  narrow = card.counted("x", "x", values[:-1])
  assert (narrow.labels[0], narrow.labels[-1]) == ("0", "9")
  assert sum(card.evenly("x", "x", np.array([1.0, 1.0]), str).counts) == 2


def test_times_past_what_integers_hold_stay_what_they_are(tmp_path):
  rows = [(f"u{n}", f"i{k}", f"{k + 1}e30", 1) for n in range(3) for k in range(4)]
  prepare(write_csv(tmp_path / "log.csv", rows), tmp_path / "shop")
  data = load_directory(tmp_path / "shop")
  assert data.interactions.times.tolist() == 3 * [1e30, 2e30, 3e30, 4e30]
  assert histories(data) == {f"u{n}": [f"i{k}" for k in range(4)] for n in range(3)}


def test_ids_with_blanks_come_back(tmp_path):
  rows = [(f"Ann & {n}  Bob", f"red mug, {k}", 1e9 + k, 1) for n in range(3) for k in range(4)]
  prepare(write_csv(tmp_path / "log.csv", rows), tmp_path / "shop")
  assert histories(load_directory(tmp_path / "shop")) == expected(rows)


def test_a_folder_of_atomic_files_is_prepared(tmp_path):
  folder = tmp_path / "atomic"
  folder.mkdir()
  lines = ["user_id:token\titem_id:token\ttimestamp:float"]
  lines += [f"u{n}\ti{k}\t{k}" for n in range(3) for k in range(4)]
  (folder / "x.inter").write_text("\n".join(lines))
  (folder / "x.item").write_text("item_id:token\tmovie_title:token_seq\ni1\tOne\ni0\tNil\n")
  prepare(folder, tmp_path / "out")
  data = load_directory(tmp_path / "out")
  assert data.item_ids.to_json() == ["i1", "i0", "i2", "i3"]
  assert data.titles[:2] == ("One", "Nil")


def atomic(
  folder, *, head="item_id:token\tmovie_title:token_seq\tclass:token_seq\ttext_emb:float_seq\tfeatures:float_seq"
):
  """A folder of RecBole's whose items have vectors and categories; i9 has nobody, i3 no row."""
  folder.mkdir()
  lines = ["user_id:token\titem_id:token\ttimestamp:float"]
  lines += [f"u{n}\ti{k}\t{k}" for n in range(3) for k in range(4)]
  (folder / "x.inter").write_text("\n".join(lines))
  rows = [
    "i1\tOne Film\tAction Sci-Fi\t1 2\t",
    "i9\tNobody\tDrama\t9 9\t1e9",
    "i0\tNil\t'Home', 'Red mugs'\t\t7",
    "i2\t\t\t3 -.5\t",
  ]
  (folder / "x.item").write_text("\n".join([head, *rows]) + "\n")
  return folder


def test_vectors_and_categories_of_atomic_files_are_kept(tmp_path, capsys):
  prepare(atomic(tmp_path / "atomic"), tmp_path / "out")
  assert "vectors = text_emb + features" in capsys.readouterr().out
  data = load_directory(tmp_path / "out")
  assert data.item_ids.to_json() == ["i1", "i0", "i2", "i3"]
  assert_array_equal(data.features["text"], np.array([[1, 2], [0, 0], [3, -0.5], [0, 0]], np.float32))
  assert_array_equal(data.present["text"], [True, False, True, False])
  assert_array_equal(data.features["features"], np.array([[0], [7], [0], [0]], np.float32))
  with gzip.open(tmp_path / "out" / "items.jsonl.gz", "rt") as file:
    records = [json.loads(line) for line in file]
  assert records[:2] == [
    {"id": "i1", "title": "One Film", "category": "Action > Sci-Fi"},
    {"id": "i0", "title": "Nil", "category": "Home > Red mugs"},
  ]
  kinds = "item_id:token\tmovie_title:token_seq\tclass:token_seq\ttext_emb:float_seq\t"
  with pytest.raises(InputError, match="line 1: expected different modalities"):
    prepare(atomic(tmp_path / "twice", head=f"{kinds}text:float_seq"), tmp_path / "none")
  (tmp_path / "atomic" / "x.item").write_text("item_id:token\temb:float_seq\ni0\t1 2\ni1\t1 2 3\ni9\tnone\n")
  with pytest.raises(InputError, match=r"x\.item line 3 field 'emb': expected 2 numbers"):
    prepare(tmp_path / "atomic", tmp_path / "none")
  assert not (tmp_path / "none").exists()


@pytest.mark.skipif(not (SHARED / "amazon18_scientific").exists(), reason="the real data is not here")
def test_real_data_exported_and_prepared_again_is_the_same(tmp_path):
  data = load_directory(SHARED / "amazon18_scientific")
  with gzip.open(SHARED / "amazon18_scientific" / "items.jsonl.gz", "rt") as file:
    titles = [json.loads(line).get("title") or "" for line in file]
  rows = [
    (f"U{user}", f"SKU-{item}", 1_500_000_000 + step)
    for user in range(data.interactions.num_users)
    for step, item in enumerate(data.interactions.history(user).tolist())
  ]
  log = write_csv(tmp_path / "log.csv", rows, ("user", "item", "time"))
  items = write_csv(tmp_path / "items.csv", [(f"SKU-{k}", title) for k, title in enumerate(titles)], ("id", "title"))
  prepare(log, tmp_path / "again", items=items, duplicates="keep")
  again = load_directory(tmp_path / "again")
  assert leave_one_out(again.interactions).split_hash == leave_one_out(data.interactions).split_hash
  assert_array_equal(again.item_ids.rows([f"SKU-{k}" for k in range(data.num_items)]), np.arange(data.num_items))
