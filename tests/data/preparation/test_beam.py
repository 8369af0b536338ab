"""What Beam's direct runner prepares is what one machine prepares by itself, to the byte."""

import csv
import json
from collections import Counter

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from bbqrec_jax.data.encoding import encode
from bbqrec_jax.data.encoding.words import HashedWords
from bbqrec_jax.data.preparation import card
from bbqrec_jax.data.preparation.prepare import prepare
from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.json_files import read_json

beam = pytest.importorskip("apache_beam")


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
  monkeypatch.setattr(card, "_draw", lambda *given: None)


def write(path, head, rows):
  with open(path, "w", newline="", encoding="utf-8") as file:
    csv.writer(file).writerows([head, *rows])
  return path


@pytest.fixture
def shop(tmp_path):
  rng = np.random.default_rng(0)
  rows = [
    (f"user {rng.integers(40)}", f"SKU-{min(int(rng.exponential(8)), 30)}", 10**12 + 1000 * int(rng.integers(90)))
    for _ in range(400)
  ]
  rows += [*rows[:20], ("", "SKU-1", 10**12), ("user 1", "SKU-2", "soon"), ("user 1", "SKU-2", 5)]
  items = [(f"SKU-{n}", f"Mug &amp;amp; {n}", "ask" if n == 5 else "$4.50") for n in range(40)] + [
    ("SKU-3", "again", ""),
    ("", "none", ""),
  ]
  return rows, items


def test_the_files_are_those_of_one_machine(tmp_path, shop):
  from bbqrec_jax.data.preparation.beam import prepare_with_beam

  rows, items = shop
  head = ("user", "item", "time")
  log, table = write(tmp_path / "log.csv", head, rows), write(tmp_path / "items.csv", ("id", "title", "price"), items)
  given = {"min_per_user": 5, "min_per_item": 5, "ties": "item"}
  prepare(log, tmp_path / "one", items=table, max_bad=0.5, **given)
  parts = [write(tmp_path / f"log{n}.csv", head, rows[n * 200 : (n + 1) * 200]) for n in range(3)]
  prepare_with_beam(parts, tmp_path / "many", items=[table], max_bad=0.5, **given)
  for name in ("sequences.txt", "timestamps.txt", "users.txt", "items.jsonl.gz"):
    assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
  one, many = (read_json(tmp_path / name / "preparation.json") for name in ("one", "many"))
  aside = many.pop("quarantine")
  assert sum((Counter(aside.get(f"log{n}.csv", {})) for n in range(3)), Counter()) == one["quarantine"].pop("log.csv")
  assert aside["items.csv"] == one.pop("quarantine")["items.csv"]
  for name in ("rows", "left_out", "columns", "times", "settings", "unused", "unread", "same_time", "split_hash"):
    assert many[name] == one[name]
  assert one["unread"] == {"prices that are no numbers": 1}
  with pytest.raises(InputError, match="of the rows to be unusable"):
    prepare_with_beam(parts, tmp_path / "none", items=[table], max_bad=0.001, **given)
  with pytest.raises(InputError, match="duplicates other than consecutive"):
    prepare_with_beam(parts, tmp_path / "none", duplicates="consecutive")


@pytest.mark.parametrize("duplicates", ["first", "last"])
def test_what_is_required_of_items_is_looked_at_before_the_core(tmp_path, shop, duplicates):
  from bbqrec_jax.data.preparation.beam import prepare_with_beam

  rows, items = shop
  head = ("user", "item", "time")
  log = write(tmp_path / "log.csv", head, rows)
  named = [(*row, "" if row[0] in ("SKU-1", "SKU-7") else f"{row[0]}.png") for row in items if row[0] != "SKU-2"]
  table = write(tmp_path / "items.csv", ("id", "title", "price", "image"), [*named, ("SKU-1", "again", "", "a.png")])
  given = {"min_per_user": 4, "min_per_item": 4, "duplicates": duplicates, "require": ("metadata", "picture")}
  report = prepare(log, tmp_path / "one", items=table, max_bad=0.5, **given)
  assert [step["name"].split(" (")[0] for step in report["steps"]] == [
    "rows that could be used", "items with metadata and picture", "without duplicates",
    "at least 4 per user and 4 per item",
  ]  # fmt: skip
  prepare_with_beam([log], tmp_path / "many", items=[table], max_bad=0.5, **given)
  for name in ("sequences.txt", "timestamps.txt", "users.txt", "items.jsonl.gz"):
    assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
  with pytest.raises(InputError, match="expected items, and metadata"):
    prepare_with_beam([log], tmp_path / "none", items=[table], require=("picture",))


def test_dates_before_those_that_most_are_stay(tmp_path):
  from bbqrec_jax.data.preparation.beam import prepare_with_beam

  rows = [(f"u{n}", f"i{k}", f"20{k:02d}-01-0{n + 1}") for n in range(4) for k in range(6)]
  rows += [("u0", "i9", "1971-05-01"), ("u0", "i8", "9999-12-31")]
  log = write(tmp_path / "log.csv", ("user", "item", "time"), rows)
  prepare(log, tmp_path / "one")
  prepare_with_beam([log], tmp_path / "many")
  for name in ("sequences.txt", "timestamps.txt", "items.jsonl.gz", "quarantine.jsonl"):
    assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_a_core_that_takes_longer_than_was_said_is_an_error():
  from bbqrec_jax.data.preparation.beam_transforms import Core, Row

  chain = [Row(f"u{n}", f"i{n + more}", 0.0, (0, 2 * n + more)) for n in range(9) for more in (0, 1)]
  with pytest.raises(Exception, match="more than 2 rounds"), beam.Pipeline() as p:
    _ = p | beam.Create(chain) | Core(per_user=2, per_item=2, rounds=2)


def test_texts_are_encoded_as_by_one_machine():
  from apache_beam.testing.util import assert_that

  from bbqrec_jax.data.encoding.beam import EncodeTexts

  texts = [f"{a} {b}" for a in ("red mug", "blue lamp", "oak table") for b in ("one", "two", "")]
  words = HashedWords(width=6, seed=0)
  words.fit(lambda: texts, len(texts))
  expected = words.encode(texts).astype(np.float16)

  def same(found):
    assert_array_equal(np.stack([vector for _, vector in sorted(found, key=lambda pair: pair[0])]), expected)

  with beam.Pipeline() as p:
    named = p | beam.Create([(f"{row:02d}", text) for row, text in enumerate(texts)])
    assert_that(named | EncodeTexts(words.arrays()), same)


def test_pictures_are_encoded_as_by_one_machine(tmp_path):
  from apache_beam.testing.util import assert_that, equal_to
  from PIL import Image

  from bbqrec_jax.data.encoding.beam import EncodePictures

  rng, images = np.random.default_rng(0), tmp_path / "images"
  images.mkdir()
  for number in range(12):
    pixels = rng.integers(256, size=(20 + number, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(images / f"{number}.{('png', 'jpg')[number % 2]}")
  (images / "3.jpg").write_bytes(b"\xff\xd8 broken")
  (images / "8.png").unlink()
  names = [f"{number}.{('png', 'jpg')[number % 2]}" for number in range(12)] + [""]
  lines = [json.dumps({"id": f"SKU-{row}", "image": name} if name else {"id": f"SKU-{row}"})
           for row, name in enumerate(names)]  # fmt: skip
  (tmp_path / "items.jsonl").write_text("\n".join(lines))
  encode.features(tmp_path, images=str(images), text="none", attributes="none", batch_size=5)
  vectors, present = (np.load(tmp_path / name) for name in ("image_features.npy", "has_image.npy"))
  assert_array_equal(np.flatnonzero(~present), [3, 8, 12])

  def same(found):
    by_id = dict(found)
    assert len(by_id) == len(found) == len(names)
    made = np.stack([by_id[f"SKU-{row}"][0] for row in range(len(names))])
    assert made.dtype == vectors.dtype
    assert made.tobytes() == vectors.tobytes()
    assert [by_id[f"SKU-{row}"][1] for row in range(len(names))] == present.tolist()

  with beam.Pipeline() as p:
    named = p | beam.Create([(f"SKU-{row}", name) for row, name in enumerate(names)])
    found = named | EncodePictures(images)
    assert_that(found.features, same, label="features")
    told = found.broken | beam.Map(lambda one: (one["id"], one["file"], one["reason"]))
    assert_that(told, equal_to([("SKU-3", "3.jpg", "broken"), ("SKU-8", "8.png", "not there")]), label="broken")
