"""What is written and pictured of items becomes features: the like of like, nothing of nothing, and no step twice."""

import concurrent.futures
import contextlib
import json
import subprocess
import sys
import types
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

import bbqrec_jax
from bbqrec_jax.data.directory import load_directory
from bbqrec_jax.data.encoding import encode, pictures, store
from bbqrec_jax.data.encoding.catalogue import attributes_of, category_levels, text_of
from bbqrec_jax.data.encoding.pictures import ColoursAndEdges, open_picture
from bbqrec_jax.data.encoding.words import HashedWords
from bbqrec_jax.data.preparation.quarantine import Quarantine
from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.files import unfinished
from bbqrec_jax.utils.json_files import read_json, write_json

COLOURS = ("red", "green", "blue")
ITEMS = 24


@pytest.fixture
def shop(tmp_path):
  folder, images = tmp_path / "shop", tmp_path / "images"
  folder.mkdir()
  images.mkdir()
  rng = np.random.default_rng(0)
  records = []
  for number in range(ITEMS):
    colour, kind = COLOURS[number % 3], ("mug", "lamp")[number % 2]
    record = {"id": f"SKU-{number}", "title": f"{colour} {kind}", "brand": f"B{number % 4}", "price": 1.0 + number}
    record |= {"category": f"Home > {kind}", "image": f"{number}.png"}
    pixels = rng.integers(40, size=(20, 30, 3))
    pixels[..., number % 3] += 180
    Image.fromarray(pixels.astype(np.uint8)).save(images / f"{number}.png")
    records.append(record)
  records[4] = {"id": "SKU-4"}
  (images / "7.png").write_bytes(b"\x89PNG broken")
  (images / "8.png").unlink()
  (folder / "items.jsonl").write_text("\n".join(map(json.dumps, records)))
  (folder / "sequences.txt").write_text("\n".join(f"{user} {user} {user + 1} {user + 2}" for user in range(20)))
  return folder


def alike(vectors, number):
  """The other item that is nearest to one."""
  cosines = vectors @ vectors[number]
  cosines[number] = -np.inf
  return int(np.argmax(cosines))


def test_features_are_made_of_all_that_is_there(shop, capsys):
  found = bbqrec_jax.features(shop, images=str(shop.parent / "images"))
  assert found == {"text": ITEMS - 1, "image": ITEMS - 3, "attributes": ITEMS - 1}
  data = load_directory(shop)
  assert {name: array.dtype for name, array in data.features.items()} == dict.fromkeys(found, np.float16)
  assert_array_equal(np.flatnonzero(~data.present["text"]), [4])
  assert_array_equal(np.flatnonzero(~data.present["image"]), [4, 7, 8])
  for name in found:
    vectors = np.asarray(data.features[name], np.float32)
    assert_array_equal(vectors[~data.present[name]], 0)
  assert_allclose(
    np.linalg.norm(np.asarray(data.features["text"], np.float32)[data.present["text"]], axis=1), 1, atol=2e-3
  )
  images = np.asarray(data.features["image"], np.float32)
  assert all(alike(images, number) % 3 == number % 3 for number in range(ITEMS) if data.present["image"][number])
  texts = np.asarray(data.features["text"], np.float32)
  assert all(alike(texts, n) % 2 == n % 2 or alike(texts, n) % 3 == n % 3 for n in range(ITEMS) if n != 4)
  broken = [json.loads(line) for line in (shop / "broken_pictures.jsonl").read_text().splitlines()]
  assert [(one["file"], one["reason"]) for one in broken] == [("7.png", "broken"), ("8.png", "not there")]
  said = "".join(capsys.readouterr())
  assert "image: 1 pictures are broken, see broken_pictures.jsonl" in said
  assert "image: 1 pictures are not there, see" in said
  bbqrec_jax.features(shop, images=str(shop.parent / "images"))
  assert "image: 1 pictures are not there, see" in "".join(capsys.readouterr()), (
    "and again where they are there already"
  )
  assert any("text features by hashed TF-IDF" in note for note in data.notes)


def test_what_is_made_stays_until_something_of_it_changes(shop, monkeypatch):
  encode.features(shop, image="none")
  before = (shop / "text_features.npy").stat().st_mtime_ns
  prints = {name: note["fingerprint"] for name, note in store.made(shop).items()}
  monkeypatch.setattr(HashedWords, "fit", None)
  assert encode.features(shop, image="none") == {"text": ITEMS - 1, "attributes": ITEMS - 1}
  assert (shop / "text_features.npy").stat().st_mtime_ns == before
  monkeypatch.undo()
  encode.features(shop, image="none", text_width=3)
  assert np.load(shop / "text_features.npy").shape == (ITEMS, 3)
  assert store.made(shop)["attributes"]["fingerprint"] == prints["attributes"]
  (shop / "items.jsonl").write_text((shop / "items.jsonl").read_text().replace("red", "pink"))
  encode.features(shop, image="none")
  assert not set(prints.values()) & {note["fingerprint"] for note in store.made(shop).values()}


def test_features_are_made_as_those_of_another_data_set(shop):
  more = shop.parent / "more"
  more.mkdir()
  lines = (shop / "items.jsonl").read_text().splitlines()
  new = json.dumps({"id": "new", "title": "purple sofa", "brand": "B0", "price": 500.0, "category": "Home > sofa"})
  (more / "items.jsonl").write_text("\n".join([new, *reversed(lines)]))
  encode.features(shop, image="none")
  encode.features(more, image="none", like=str(shop))
  for name in ("text", "attributes"):
    ours, theirs = (np.load(folder / f"{name}_features.npy") for folder in (shop, more))
    assert_array_equal(theirs[:0:-1], ours)
    assert np.isfinite(theirs).all()
  assert encode.features(more, image="none", like=str(shop))["text"] >= ITEMS - 1
  with pytest.raises(InputError, match=r"--like=.*text_words\.npz"):
    encode.features(more, image="none", like=str(shop.parent))
  (shop / "text_words.npz").write_bytes((shop / "attributes_words.npz").read_bytes()[:-5])
  with pytest.raises(InputError, match=r"text_words\.npz"):
    encode.features(more, image="none", like=str(shop))


@pytest.mark.parametrize("damaged", [False, True])
def test_a_stopped_run_goes_on_where_it_was(shop, monkeypatch, damaged):
  whole = shop.parent / "whole"
  whole.mkdir()
  for name in ("items.jsonl", "sequences.txt"):
    (whole / name).write_bytes((shop / name).read_bytes())
  given = {"images": str(shop.parent / "images"), "batch_size": 5, "text": "none", "attributes": "none"}
  encode.features(whole, **given)
  calls = []
  encoded = ColoursAndEdges.encode

  def stop(self, prepared):
    calls.append(len(prepared))
    if len(calls) == 3:
      raise KeyboardInterrupt
    return encoded(self, prepared)

  monkeypatch.setattr(ColoursAndEdges, "encode", stop)
  with pytest.raises(KeyboardInterrupt):
    encode.features(shop, **given)
  assert not (shop / "image_features.npy").exists()
  if damaged:
    half = unfinished(shop / "image_features.npy")
    half.write_bytes(half.read_bytes()[:-1])
  encode.features(shop, **given)
  assert len(calls) == 3 + (5 if damaged else 3), "two batches of five were there"
  for name in ("image_features.npy", "has_image.npy", "broken_pictures.jsonl"):
    assert (shop / name).read_bytes() == (whole / name).read_bytes()
  assert not [path for path in shop.iterdir() if path.name.endswith(".unfinished")]


def test_a_killed_run_has_lost_no_broken_picture(shop):
  given = {"images": str(shop.parent / "images"), "batch_size": 5, "text": "none", "attributes": "none"}
  program = f"""
import os
from bbqrec_jax.data.encoding import encode, store
write = store.write_json
def kill(path, value):
  write(path, value)
  if value.get("done") == 10:
    os.kill(os.getpid(), 9)
store.write_json = kill
encode.features({str(shop)!r}, **{given!r})
"""
  ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
  assert ended.returncode == -9, ended.stderr
  with (shop / "broken_pictures.jsonl").open("a") as file:
    file.write('{"file": "of what was not noted as done", "row": 10, "reason": "broken", "text": ""}\n{"file": "cut sh')
  encode.features(shop, **given)
  broken = [json.loads(line) for line in (shop / "broken_pictures.jsonl").read_text().splitlines()]
  assert [(one["file"], one["reason"]) for one in broken] == [("7.png", "broken"), ("8.png", "not there")]


def test_a_modality_that_all_items_have_the_same_of_is_left_out(shop, capsys):
  encode.features(shop, text="none", image="none")
  lines = (shop / "items.jsonl").read_text().splitlines()
  records = [json.loads(line) | {"brand": "one", "category": "", "price": None} for line in lines]
  (shop / "items.jsonl").write_text("\n".join(map(json.dumps, records)))
  assert encode.features(shop, image="none") == {"text": ITEMS}
  assert "attributes: all items that have it have the same" in capsys.readouterr().out
  assert load_directory(shop).modalities == ("text",)
  with pytest.raises(InputError, match="tell items apart, found none"):
    encode.features(shop, text="none", image="none")


def test_pictures_that_are_nowhere_are_left_out_and_urls_are_matched_by_name(shop, capsys):
  records = list(map(json.loads, (shop / "items.jsonl").read_text().splitlines()))
  for record in records:
    if "image" in record:
      record["image"] = f"http://shop.example/a/{record['image']}?width=9"
  (shop / "items.jsonl").write_text("\n".join(map(json.dumps, records)))
  assert "image" not in encode.features(shop)
  assert "--images=FOLDER takes them in" in capsys.readouterr().out
  assert encode.features(shop, images=str(shop.parent / "images"))["image"] == ITEMS - 3
  assert_array_equal(np.flatnonzero(~load_directory(shop).present["image"]), [4, 7, 8])


def test_every_item_with_words_has_text_features(tmp_path):
  titles = ["red mug", "oak table", "blue lamp", "soft chair", "tall glass", "iron pan", "wool rug", ""]
  (tmp_path / "items.jsonl").write_text("\n".join(json.dumps({"title": title}) for title in titles))
  (tmp_path / "sequences.txt").write_text("0 0 1 2 3\n1 4 5 6 7\n")
  for width in (256, 3):
    assert encode.features(tmp_path, text_width=width) == {"text": 7}
    assert_array_equal(load_directory(tmp_path).present["text"], np.array(titles) != "")


def test_vectors_with_ids_are_joined(shop):
  ids = [f"SKU-{number}" for number in (5, 3, 9)] + ["other"]
  vectors = np.arange(8, dtype=np.float32).reshape(4, 2)
  np.savez(shop.parent / "audio.npz", ids=np.array(ids), vectors=vectors)
  columns = {"sku": ids, "vector": vectors.tolist()}
  pyarrow.parquet.write_table(pa.table(columns), shop.parent / "video.parquet")
  given = {"audio": shop.parent / "audio.npz", "video": shop.parent / "video.parquet", "clip": (ids, vectors)}
  found = encode.features(shop, join=given, text="none", image="none", attributes="none")
  assert found == dict.fromkeys(given, 3)
  data = load_directory(shop)
  for name in given:
    assert_array_equal(np.flatnonzero(data.present[name]), [3, 5, 9])
    assert_array_equal(data.features[name][[5, 3, 9]], vectors[:3])


@pytest.mark.parametrize(
  ("ids", "vectors", "says"),
  [
    (["a"], np.ones((1, 2)), "none of them"),
    (["SKU-1", "SKU-1"], np.ones((2, 2)), "each item once"),
    (["SKU-1"], np.full((1, 2), np.nan), "row 0: expected finite"),
    (["SKU-1"], np.full((1, 2), 1e6), "float16"),
    (["SKU-1"], np.ones(2), "expected ids"),
  ],
)
def test_vectors_that_cannot_be_joined_are_refused(shop, ids, vectors, says):
  with pytest.raises(InputError, match=says):
    encode.features(shop, join={"x": (ids, vectors)}, text="none", image="none", attributes="none")
  assert not (shop / "x_features.npy").exists()


def test_features_of_others_are_never_replaced(shop):
  np.save(shop / "text_features.npy", np.ones((ITEMS, 2), np.float32))
  with pytest.raises(InputError, match="found others"):
    encode.features(shop, image="none")
  assert encode.features(shop, text="none", image="none") == {"attributes": ITEMS - 1}


@pytest.mark.parametrize(
  ("settings", "says"),
  [
    ({"text": "bert"}, "--text=bert"),
    ({"image": "vit"}, "--image=vit"),
    ({"image": "timm:resnet18"}, "bbqrec_jax.image"),
    ({"text": "sentence-transformers:x"}, "bbqrec_jax.text"),
    ({"attributes": "x"}, "--attributes must be one of"),
    ({"images": "/nowhere"}, "--images=/nowhere"),
    ({"images": "", "image": "timm:resnet18"}, "--images=FOLDER"),
    ({"txt": "x"}, "--txt is unknown"),
  ],
)
def test_what_cannot_be_made_is_refused(shop, monkeypatch, settings, says):
  for name in ("timm", "sentence_transformers"):
    monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(InputError, match=says):
    encode.features(shop, **({"images": str(shop.parent / "images")} | settings))


def test_items_that_say_nothing_are_refused(shop):
  (shop / "items.jsonl").write_text("{}\n" * ITEMS)
  with pytest.raises(InputError, match="expected titles"):
    encode.features(shop)
  with pytest.raises(InputError, match="--text=sentence-transformers:x"):
    encode.features(shop, text="sentence-transformers:x")


def test_a_network_reads_texts_and_only_those_that_are_there(shop, monkeypatch):
  read = []

  class Network:
    def __init__(self, name):
      assert name == "a-network"

    def encode(self, texts, **given):
      read.extend(texts)
      return np.array([[len(text), 1.0] for text in texts], np.float32)

  module = types.SimpleNamespace(SentenceTransformer=Network, __version__="9")
  monkeypatch.setitem(sys.modules, "sentence_transformers", module)
  encode.features(shop, text="sentence-transformers:a-network", image="none", attributes="none", batch_size=7)
  assert "" not in read
  features = np.load(shop / "text_features.npy")
  assert_array_equal(np.flatnonzero(~features.any(axis=1)), [4])
  assert features[0, 0] == len("red mug . B0 . Home > mug")
  assert "a-network" in read_json(shop / "features.json")["text"]["made_by"]


def test_what_a_network_does_not_read_of_texts_is_counted_and_on_the_card(shop, monkeypatch, capsys):
  class Network:
    max_seq_length = 8

    def __init__(self, name):
      pass

    def tokenizer(self, texts, *, truncation, max_length):
      assert truncation
      return {"input_ids": [text.split()[:max_length] for text in texts]}

    def encode(self, texts, **given):
      return np.array([[len(text), 1.0] for text in texts], np.float32)

  module = types.SimpleNamespace(SentenceTransformer=Network, __version__="9")
  monkeypatch.setitem(sys.modules, "sentence_transformers", module)
  records = list(map(json.loads, (shop / "items.jsonl").read_text().splitlines()))
  for row in (3, 9, 20):
    records[row]["description"] = "long"  # Eight words and signs without it.
  records[5]["price"] = "ask"
  (shop / "items.jsonl").write_text("\n".join(map(json.dumps, records)))
  (shop / "card.html").write_text("<body>before<!--features--><!--end of features-->after")
  write_json(shop / "card.json", {"statistics": {}})
  given = {"text": "sentence-transformers:a-network", "image": "none"}
  for _ in range(2):  # Made, and there already.
    encode.features(shop, **given)
    said = "".join(capsys.readouterr())
    assert "text: 3 texts are read no further than 8 tokens" in said
    assert "attributes: 1 prices are no numbers" in said
    page = (shop / "card.html").read_text()
    assert page.startswith("<body>before<!--features--><h2>Features</h2>")
    assert page.endswith("<!--end of features-->after")
    assert page.count("3 texts are read no further than 8 tokens") == 1
  told = read_json(shop / "card.json")["features"]
  assert told["text"] == {"made_by": "sentence-transformers 9 a-network", "items": ITEMS - 1,
                          "left_out": {"texts are read no further than 8 tokens": 3}}  # fmt: skip
  assert told["attributes"]["left_out"] == {"prices are no numbers": 1}


def test_texts_about_the_same_are_near_whatever_their_language():
  texts = [
    f"{a} {b}" for a in ("red mug", "blue lamp", "赤い皿", "large oak table") for b in ("one", "two", "drei", "")
  ]
  words = HashedWords(width=16, seed=0)
  words.fit(lambda: texts, len(texts))
  vectors = words.encode(texts)
  assert all(alike(vectors, number) // 4 == number // 4 for number in range(len(texts)))
  assert_array_equal(words.encode(["", "!!"]), 0)
  again = HashedWords(width=16, seed=0)
  again.fit(lambda: iter(texts), len(texts))
  assert_allclose(again.encode(texts[:3]), vectors[:3], atol=1e-5)


def test_what_is_said_of_an_item():
  record = {"title": "A  mug", "brand": None, "category": "Home > Mugs", "description": ["x", "y"], "price": 4}
  assert text_of(record) == "A mug . Home > Mugs . x y"
  assert attributes_of(record) == (["category=home", "path=>home", "category=mugs", "path=>home>mugs"], 4.0)
  assert attributes_of({"price": True}) == ([], None)


@pytest.mark.parametrize(
  ("record", "levels"),
  [
    ({"category": "Home >Mugs> "}, ["Home", "Mugs"]),
    ({"category": ["Home", "Mugs, red"]}, ["Home", "Mugs, red"]),
    ({"category": "", "categories": "Home, Mugs,"}, ["Home", "Mugs"]),
    ({"categories": "Home > Mugs, red"}, ["Home", "Mugs, red"]),
    ({"categories": [["Home", "Mugs"]]}, ["Home", "Mugs"]),
    ({"category": "Home", "categories": "Mugs"}, ["Home"]),
    ({"category": None, "categories": None}, []),
  ],
)
def test_the_levels_of_a_category_are_read_as_they_are_written(record, levels):
  assert category_levels(record) == levels
  assert attributes_of(record)[0][::2] == [f"category={level.lower()}" for level in levels]


def test_pictures_of_any_kind_are_opened(tmp_path):
  kinds = {"RGBA": "png", "L": "jpg", "P": "gif", "CMYK": "jpg", "1": "bmp", "LA": "png"}
  for mode, ending in kinds.items():
    path = tmp_path / f"{mode}.{ending}"
    Image.new(mode, (300, 200)).save(path)
    picture = open_picture(path, 64)
    assert picture.mode == "RGB"
  assert open_picture(tmp_path / "RGBA.png", 64).getpixel((0, 0)) == (255, 255, 255), "transparent is white"


def test_a_picture_that_says_it_is_huge_is_broken(tmp_path, monkeypatch):
  Image.new("RGB", (300, 200)).save(tmp_path / "x.png")
  monkeypatch.setattr(pictures, "_MOST_PIXELS", 100)
  with pytest.raises(ValueError, match="300 x 200"):
    open_picture(tmp_path / "x.png", 64)


def test_what_pillow_thinks_of_a_picture_is_not_said(tmp_path, monkeypatch):
  Image.new("RGB", (300, 200), "red").save(tmp_path / "x.png")
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
  with (
    warnings.catch_warnings(action="error"),
    concurrent.futures.ThreadPoolExecutor(1) as pool,
    contextlib.closing(Quarantine(tmp_path / "broken.jsonl")) as quarantine,
  ):
    features, present = pictures.encode_pictures(ColoursAndEdges(), tmp_path, ["x.png"], 0, quarantine, pool)
  assert present.all()
  assert features.any()


def test_a_half_of_something_else_is_begun_anew(shop):
  encode.features(shop, image="none", attributes="none")
  expected = (shop / "text_features.npy").read_bytes()
  (shop / "text_features.npy").rename(unfinished(shop / "text_features.npy"))
  (shop / "features.json").unlink()
  encode.features(shop, image="none", attributes="none")
  assert (shop / "text_features.npy").read_bytes() == expected


def test_a_note_of_features_cannot_move_a_terminals_cursor(shop):
  encode.features(shop, image="none", attributes="none")
  note = read_json(shop / "features.json")["text"]
  write_json(shop / "features.json", {"text": note | {"made_by": "\x1b[2J"}})
  assert any(r"text features by \x1b[2J, fingerprint" in sentence for sentence in load_directory(shop).notes)
  write_json(shop / "features.json", {"text": note | {"left_out": {"\x1b[2J": 3, "x": "many"}}})
  assert encode.features(shop, image="none", attributes="none") == {"text": ITEMS - 1}


def test_ids_to_join_that_are_no_text_are_refused(shop):
  ids = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xf6"], pa.binary()).buffers())
  pyarrow.parquet.write_table(pa.table({"id": ids, "vector": [[1.0, 2.0]]}), shop.parent / "x.parquet")
  with pytest.raises(InputError, match="could not read one"):
    encode.features(shop, join={"audio": shop.parent / "x.parquet"}, text="none", image="none", attributes="none")
