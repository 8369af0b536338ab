"""Miniature dumps as the three releases lay them out become the same data set, as a folder and through TFDS."""

import gzip
import importlib.util
import json
import types

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import bbqrec_jax
from bbqrec_jax.config import default_config
from bbqrec_jax.data import tfds_source
from bbqrec_jax.data.amazon_reviews.image_features import read_image_features
from bbqrec_jax.data.amazon_reviews.prepare import differences, prepare_category, prepare_recipe
from bbqrec_jax.data.amazon_reviews.releases import RECIPES, RELEASES, find_files
from bbqrec_jax.data.directory import load_directory
from bbqrec_jax.data.encoding.encode import features
from bbqrec_jax.data.interactions import leave_one_out
from bbqrec_jax.data.preparation import card
from bbqrec_jax.data.sources import load
from bbqrec_jax.errors import InputError

CATEGORY = "Musical_Instruments"
ITEMS = [f"B{number:09d}" for number in range(9)]


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
  monkeypatch.setattr(card, "_draw", lambda *given: None)


def reviews():
  """(user, item, seconds, stars) of a 5-core, and of some that it leaves out."""
  rng = np.random.default_rng(0)
  rows = [
    (f"A{user}", ITEMS[(user + step) % 8], 10**9 + 60 * user + step, 5.0) for user in range(12) for step in range(6)
  ]
  rows += [("A99", ITEMS[0], 10**9, 1.0), ("A1", ITEMS[8], 10**9, 3.0)]
  return [rows[place] for place in rng.permutation(len(rows))]


def write_dump(folder, release):
  """The files of a category, as the release has them."""
  folder.mkdir(exist_ok=True)
  of = RELEASES[release]
  log, items = of.log, of.items
  texts = []
  for user, item, second, stars in reviews():
    time = 1000 * second if release == "2023" else second
    texts.append({log["user"]: user, log["item"]: item, log["time"]: time, log["rating"]: stars, "summary": "it's"})
    if release == "2023":
      texts[-1]["asin"] = item + "X"
  objects = []
  for number, item in enumerate(ITEMS):
    one = {items["item_id"]: item, items["title"]: f"Drum &amp; stick {number}", items["brand"]: f"Bang {number % 2}"}
    one[items["category"][0]] = [["Music", "Drums"]] if release == "2014" else ["Music", "Drums"]
    one["description"] = "it's loud" if release == "2014" else ["it's", "loud"]
    one[items["image"]] = f"http://x/{item}.jpg"
    one[items["price"]] = 9.5 if release != "2018" else "$9.50"
    objects.append(one)
  packed = release != "2018"
  name = of.reviews[0].format(CATEGORY)
  body = "\n".join(json.dumps(text, indent=2 if release == "2018" else None) for text in texts).encode()
  (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(body) if packed else body)
  body = "\n".join(repr(one) if release == "2014" else json.dumps(one) for one in objects).encode()
  (folder / (of.meta[0].format(CATEGORY) + ".gz")).write_bytes(gzip.compress(body))
  return folder


def write_pictures(path, ids):
  vectors = np.random.default_rng(1).normal(size=(len(ids), 4096)).astype("<f4")
  path.write_bytes(b"".join(one.encode() + vector.tobytes() for one, vector in zip(ids, vectors, strict=True)))
  return vectors


@pytest.mark.parametrize("release", RELEASES)
def test_each_release_becomes_the_same_data_set(tmp_path, release):
  report = prepare_category(write_dump(tmp_path / "raw", release), tmp_path / "out", release=release, category=CATEGORY)
  data = load_directory(tmp_path / "out")
  assert data.item_ids.to_json() == ITEMS[:8]
  assert data.titles[3] == "Drum & stick 3"
  assert sorted(data.interactions.users) == sorted(f"A{user}" for user in range(12))
  row = data.interactions.users.tolist().index("A2")
  assert [data.item_ids[item] for item in data.interactions.history(row)] == [
    ITEMS[(2 + step) % 8] for step in range(6)
  ]
  assert data.interactions.times.min() == 10**9
  assert not report["quarantine"]
  with gzip.open(tmp_path / "out" / "items.jsonl.gz", "rt") as file:
    first = json.loads(next(file))
  assert first == {"id": ITEMS[0], "title": "Drum & stick 0", "description": first["description"], "brand": "Bang 0",
                   "category": "Music > Drums", "price": 9.5, "image": f"http://x/{ITEMS[0]}.jpg"}  # fmt: skip
  assert first["description"].split(" > ")[0].startswith("it's")


@pytest.mark.parametrize("release", RELEASES)
def test_each_release_becomes_a_trained_model(tmp_path, release):
  raw = write_dump(tmp_path / "raw", release)
  files = RELEASES[release].reviews, RELEASES[release].meta
  log, meta = (next(raw.glob(names[0].format(CATEGORY) + "*")) for names in files)
  bbqrec_jax.prepare(log, tmp_path / "data", items=meta, min_per_user=5, min_per_item=5)
  bbqrec_jax.features(tmp_path / "data", text_width=4, attribute_width=2)
  config = bbqrec_jax.preset("dense")
  config.update_from_flattened_dict({
    "partitioner": "single", "tokenizer.quantizer": "rq_kmeans", "tokenizer.num_levels": 2, "tokenizer.num_codes": 4,
    "recommender.width": 32, "recommender.mlp_width": 32, "recommender.num_layers": 1, "recommender.dropout": 0.0,
    "recommender.similarity": (), "recommender.candidate_similarity.streams": (), "recommender.steps": 120,
    "recommender.evaluate_every": 120, "recommender.max_length": 8, "recommender.optimizer.learning_rate": 1e-2,
  })  # fmt: skip
  run = bbqrec_jax.run(config, tmp_path / "run", data=tmp_path / "data")
  # Everybody goes through the items in turn.
  assert [one.item for one in run.recommend([[ITEMS[2], ITEMS[3], ITEMS[4]]], k=1)[0]] == [ITEMS[5]]


def test_what_is_missing_is_told_with_its_place(tmp_path):
  with pytest.raises(InputError, match=r"download http\S*reviews_Musical_Instruments_5.json.gz and http\S*meta_Mus"):
    find_files(tmp_path, "2014", CATEGORY)
  with pytest.raises(InputError, match="did you mean Musical_Instruments"):
    find_files(tmp_path, "2014", "Musical_Instrument")
  with pytest.raises(InputError, match="release of 2014, 2018, 2023"):
    find_files(tmp_path, "2020", CATEGORY)
  with pytest.raises(InputError, match="a recipe of instruments"):
    prepare_recipe(tmp_path, tmp_path / "out", name="drums")


def write_ratings(folder, rows):
  """The table of all ratings of 2018, which has no header."""
  lines = (f"{item},{user},{stars},{second}\n" for user, item, second, stars in rows)
  (folder / f"{CATEGORY}.csv").write_text("".join(lines))


def test_a_recipe_takes_first_ratings_of_items_with_a_picture_and_then_the_core(tmp_path):
  # Five users rate A..E, in turn, which is a 5-core. What else there is would be one, too, in another order of steps:
  # - "late" has five ratings, but two of them of A: the first of these counts, and four are left.
  # - F has five ratings and no metadata, G five and no picture: the 5-core of all ratings would hold both.
  # - "leans" has rated A..D and F: without F it has four.
  folder = tmp_path / "raw"
  folder.mkdir()
  users = [f"u{n}" for n in range(5)]
  rows = [(user, "ABCDE"[(n + step) % 5], 100 * n + step, 5.0) for n, user in enumerate(users) for step in range(5)]
  rows += [(user, item, 1000 + n, 4.0) for n, user in enumerate(users) for item in "FG"]
  rows += [("late", item, 2000 + n, 3.0) for n, item in enumerate("ABCDA")]
  rows += [("leans", item, 3000 + n, 3.0) for n, item in enumerate("ABCDF")]
  rows += [("u0", "A", 4000, 1.0)]  # u0 rated A at 0 already.
  write_ratings(folder, rows)
  meta = [{"asin": item, "title": f"Drum {item}", "imageURL": [] if item == "G" else [f"http://x/{item}.jpg"]}
          for item in "ABCDEG"]  # fmt: skip
  (folder / f"meta_{CATEGORY}.json").write_text("".join(json.dumps(one) + "\n" for one in meta))
  report = prepare_recipe(folder, tmp_path / "out", name="instruments")
  data = load_directory(tmp_path / "out")
  found = {
    str(user): "".join(data.item_ids[item] for item in data.interactions.history(row))
    for row, user in enumerate(data.interactions.users)
  }
  assert found == {"u0": "ABCDE", "u1": "BCDEA", "u2": "CDEAB", "u3": "DEABC", "u4": "EABCD"}
  assert [(step["interactions"], step["users"], step["items"]) for step in report["steps"]] == [
    (46, 7, 7), (35, 7, 5), (33, 7, 5), (25, 5, 5),
  ]  # fmt: skip
  pictures = tmp_path / "pictures"
  pictures.mkdir()
  for item in "ABCD":
    (pictures / f"{item}.jpg").write_bytes(b"")
  with pytest.raises(InputError, match=r"got none .*items with metadata and picture: 30 of 7 users, 4 items"):
    prepare_recipe(folder, tmp_path / "other", name="instruments", images=pictures)
  for wrong in ({"require": ("metadata",)}, {"require": ("picture",)}):
    with pytest.raises(InputError, match=r"--require=.*expected --items"):
      bbqrec_jax.prepare(
        folder / f"{CATEGORY}.csv", tmp_path / "other", columns=("item", "user", "stars", "time"), **wrong
      )
  with pytest.raises(InputError, match="expected items with picture"):
    bbqrec_jax.prepare(
      folder / f"{CATEGORY}.csv", tmp_path / "other", columns=("item", "user", "stars", "time"),
      items={"id": ["A"], "title": ["Drum"]}, require="picture",
    )  # fmt: skip


def test_a_recipe_says_where_its_counts_are_others(tmp_path, capsys):
  folder = write_dump(tmp_path / "raw", "2018")
  with pytest.raises(InputError, match=r"download http\S*/Musical_Instruments\.csv, and"):
    prepare_recipe(folder, tmp_path / "out", name="instruments")
  write_ratings(folder, reviews())
  report = prepare_recipe(folder, tmp_path / "out", name="instruments")
  assert len(differences(RECIPES["instruments"], report)) == 2
  assert "12 users, where 17112 are published" in capsys.readouterr().out
  report["steps"].append({"users": 17112, "items": 6250})
  assert not differences(RECIPES["instruments"], report)


def test_picture_features_are_read_for_the_items_that_are_wanted(tmp_path):
  path = tmp_path / "image_features_X.b"
  vectors = write_pictures(path, ITEMS)
  ids, found = read_image_features(path, {ITEMS[4], ITEMS[2], "none"})
  assert ids == [ITEMS[2], ITEMS[4]]
  assert_array_equal(found, vectors[[2, 4]])
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(InputError, match="no whole number"):
    read_image_features(path, set(ITEMS))
  path.write_bytes(b"\xff" * 16394)
  with pytest.raises(InputError, match="record 0"):
    read_image_features(path, set(ITEMS))


def test_the_builder_gives_what_the_folder_holds(tmp_path):
  (tmp_path / "tfds" / "downloads").mkdir(parents=True)
  raw = write_dump(tmp_path / "tfds" / "downloads" / "manual", "2014")
  write_pictures(raw / f"image_features_{CATEGORY}.b", ITEMS[:5])
  settings = default_config().data
  settings.source, settings.path = "tfds:amazon_reviews/2014_musical_instruments", str(tmp_path / "tfds")
  made = load(settings)
  prepare_category(raw, tmp_path / "out", release="2014", category=CATEGORY)
  features(tmp_path / "out", image="none", join={"image": raw / f"image_features_{CATEGORY}.b"})
  data = load_directory(tmp_path / "out")
  assert leave_one_out(made.interactions).split_hash == leave_one_out(data.interactions).split_hash
  assert_array_equal(made.interactions.users, data.interactions.users)
  assert_array_equal(made.interactions.times, data.interactions.times)
  assert made.item_ids.to_json() == data.item_ids.to_json()
  assert made.titles == data.titles
  assert made.modalities == data.modalities == ("attributes", "image", "text")
  for name in made.modalities:
    assert_array_equal(made.present[name], data.present[name])
    assert_array_equal(made.features[name], data.features[name])
  settings.modalities = ("text",)
  assert load(settings).modalities == ("text",)
  write_ratings(write_dump(raw, "2018"), reviews())
  settings.source, settings.modalities = "tfds:amazon_reviews/instruments", ()
  assert sorted(load(settings).interactions.users) == sorted(f"A{user}" for user in range(12))
  settings.source = "tfds:amazon_reviews/2018_video_games"
  for folder in ("tfds", "fresh"):  # Where there are files of something else, and where there is nothing.
    settings.path = str(tmp_path / folder)
    with pytest.raises(InputError, match=r"downloads/manual.*http\S*Video_Games_5.json.gz"):
      load(settings)


def test_a_builder_that_needs_tensorflow_is_told_so(tmp_path, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"found none of that name.*pip install tensorflow"):
    tfds_source.load_tfds("tfds:no_such_builder", tmp_path)


def test_builders_of_others_give_one_interaction_an_example(monkeypatch):
  examples = [
    {"user_id": f"u{n % 3}".encode(), "movie_id": f"{n % 4}".encode(), "movie_title": f"T{n % 4}".encode(),
     "timestamp": 1000 - n, "user_rating": 3.0} for n in range(24)
  ]  # fmt: skip
  builder = types.SimpleNamespace(
    info=types.SimpleNamespace(features=dict.fromkeys(examples[0]), splits=["train"]),
    as_data_source=lambda split: examples,
  )
  monkeypatch.setattr(tfds_source, "_builder", lambda name, path: builder)
  data = tfds_source.load_tfds("tfds:movielens/100k-ratings")
  assert data.interactions.users.tolist() == ["u0", "u1", "u2"]
  assert dict(zip(data.item_ids.to_json(), data.titles, strict=True)) == {f"{n}": f"T{n}" for n in range(4)}
  assert [data.item_ids[item] for item in data.interactions.history(0)] == [str(n % 4) for n in range(21, -1, -3)]
