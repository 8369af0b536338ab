"""Features: what is loaded, what is refused, and figures over blocks of rows against NumPy over the whole array."""

import pathlib

import numpy as np
import pytest

from bbqrec_jax.data import feature_store
from bbqrec_jax.data import features as features_module
from bbqrec_jax.data.features import (
  choose_modalities,
  features_hash,
  load_modalities,
  load_modality,
  release,
  row_blocks,
  standardization,
)
from bbqrec_jax.errors import InputError

NUM_ITEMS = 7


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Blocks of two rows, so that every test crosses their borders."""
  monkeypatch.setattr(features_module, "BLOCK", 6)


def make(dtype=np.float32):
  array = np.random.default_rng(0).normal(size=(NUM_ITEMS, 3)).astype(dtype)
  array[4] = 0
  return array


def save(folder, array, name="text_features.npy"):
  np.save(folder / name, array)
  return folder / name


def refusal(call, *parts):
  with pytest.raises(InputError) as error:
    call()
  message = str(error.value)
  assert "\n" not in message
  assert all(part in message for part in parts), message


def test_row_blocks_cover_every_row_once():
  rows = [row for block in row_blocks(make()) for row in range(NUM_ITEMS)[block]]
  assert rows == list(range(NUM_ITEMS))
  assert len(list(row_blocks(make()))) == 4


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_features_are_mapped_in_their_own_dtype(tmp_path, dtype):
  features, present = load_modality(save(tmp_path, make(dtype)), num_items=NUM_ITEMS)
  np.testing.assert_array_equal(features, make(dtype))
  assert isinstance(features, np.memmap)
  assert features.dtype == dtype
  np.testing.assert_array_equal(present, [True, True, True, True, False, True, True])


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64])
def test_a_mask_overrides_the_zero_rows(tmp_path, dtype):
  mask = np.array([1, 0, 1, 1, 1, 1, 0], dtype)
  mask_path = save(tmp_path, mask, "has_text.npy")
  _, present = load_modality(save(tmp_path, make()), mask_path=mask_path, num_items=NUM_ITEMS)
  np.testing.assert_array_equal(present, mask.astype(bool))
  assert present.dtype == bool


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_what_stands_in_a_row_that_the_mask_marks_absent_means_nothing(tmp_path, value):
  array = with_value(value, np.float64)
  path, mask = save(tmp_path, array), np.arange(NUM_ITEMS) != 5
  mask_path = save(tmp_path, mask, "has_text.npy")
  features, present = load_modality(path, mask_path=mask_path, num_items=NUM_ITEMS)
  np.testing.assert_array_equal(present, mask)
  store = feature_store.FeatureStore({"text": features}, {"text": present})
  rows = store.rows(np.arange(NUM_ITEMS))[0]["text"]
  array[5] = 0.0
  expected = feature_store.FeatureStore({"text": array}, {"text": mask}).rows(np.arange(NUM_ITEMS))[0]["text"]
  np.testing.assert_array_equal(rows, expected)
  save(tmp_path, np.arange(NUM_ITEMS) != 4, "has_text.npy")
  refusal(
    lambda: load_modality(path, mask_path=mask_path, num_items=NUM_ITEMS),
    f"{path} row 5 column 1: expected a finite float32 number",
    "if the item lacks the modality, mark it so in has_text.npy",
  )


def test_a_mask_without_its_modality_is_refused(tmp_path):
  save(tmp_path, make())
  save(tmp_path, np.ones(NUM_ITEMS, bool), "has_txt.npy")
  for table, part in (
    ({}, "found text_features.npy; rename"),
    ({"txt": make()}, "'txt' is a column; leave the column"),
  ):
    refusal(
      lambda table=table: load_modalities(tmp_path, ["text"], num_items=NUM_ITEMS, in_tables=table),
      f"{tmp_path / 'has_txt.npy'}: expected txt_features.npy beside it",
      part,
    )


def test_a_mask_that_is_not_there_is_no_mask(tmp_path):
  _, present = load_modality(save(tmp_path, make()), mask_path=tmp_path / "has_text.npy", num_items=NUM_ITEMS)
  assert present.sum() == NUM_ITEMS - 1


def with_value(value, dtype=np.float32):
  array = make(dtype)
  array[5, 1] = value
  return array


@pytest.mark.parametrize(
  ("array", "parts"),
  [
    (make()[:5], ["expected 7 rows", "got 5", "row k for item k"]),
    (make()[0], ["expected shape [items, width]", "got [3]"]),
    (make()[:, :0], ["expected shape [items, width]", "got [7, 0]"]),
    (np.array(1.0), ["expected shape [items, width]", "got []"]),
    (make().astype(np.int32), ["expected float16, float32 or float64", "got int32", "astype('float32')"]),
    (make().astype(np.complex64), ["expected float16, float32 or float64", "got complex64"]),
    (make().astype(np.longdouble), ["expected float16, float32 or float64"]),
    (with_value(np.nan), ["row 5 column 1", "expected a finite float32 number", "got nan", "write the row as zeros"]),
    (with_value(-np.inf, np.float16), ["row 5 column 1", "got -inf"]),
    (with_value(1e300, np.float64), ["row 5 column 1", "got 1e+300"]),
    (np.zeros_like(make()), ["expected features for some items", "none of 7", "leave this modality out"]),
    (np.array([[{}]] * NUM_ITEMS), ["expected a .npy file of plain numbers", "Python objects", "numpy.save"]),
    (np.zeros(NUM_ITEMS, "f4,f4"), ["expected float16, float32 or float64"]),
  ],
  ids=lambda value: "" if isinstance(value, np.ndarray) else value[0].replace(" ", "_"),
)
def test_bad_features_are_refused(tmp_path, array, parts):
  path = save(tmp_path, array)
  refusal(lambda: load_modality(path, num_items=NUM_ITEMS), str(path), *parts)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04zip", b"text\n", "cut header", "cut data", "version", "shape"])
def test_a_damaged_file_is_refused(tmp_path, damage):
  path = save(tmp_path, make())
  whole = path.read_bytes()
  contents = {
    "cut header": whole[:40],
    "cut data": whole[:-4],
    "version": whole.replace(b"\x01\x00v", b"\x09\x00v", 1),
    "shape": whole.replace(b"(7, 3)", b"(7, [)", 1),
  }
  path.write_bytes(damage if isinstance(damage, bytes) else contents[damage])
  assert path.read_bytes() != whole
  refusal(lambda: load_modality(path, num_items=NUM_ITEMS), str(path), "expected a .npy file", "numpy.save")


def test_features_that_are_not_there_are_refused(tmp_path):
  refusal(lambda: load_modality(tmp_path / "no.npy", num_items=3), f"{tmp_path / 'no.npy'}: expected", "found nothing")


@pytest.mark.parametrize(
  ("mask", "parts"),
  [
    (np.ones(6, bool), ["expected shape [7]", "got [6]"]),
    (np.ones((7, 1), bool), ["expected shape [7]", "got [7, 1]"]),
    (np.ones(7), ["expected bool or 0/1 integers", "got dtype float64", "astype(bool)"]),
    (np.array([0, 1, 1, 2, 1, 1, 1]), ["row 3", "expected 0 or 1", "got 2"]),
    (np.zeros(7, bool), ["expected features for some items", "none of 7"]),
    (np.array([None] * 7), ["expected a .npy file of plain numbers"]),
  ],
  ids=["length", "rank", "dtype", "value", "empty", "objects"],
)
def test_a_bad_mask_is_refused(tmp_path, mask, parts):
  mask_path = save(tmp_path, mask, "has_text.npy")
  path = save(tmp_path, make())
  refusal(lambda: load_modality(path, mask_path=mask_path, num_items=NUM_ITEMS), str(mask_path), *parts)


def test_modalities_are_those_asked_for_or_all_by_name():
  found = ["text", "audio", "image"]
  assert choose_modalities(found, (), path="x") == ("audio", "image", "text")
  assert choose_modalities(found, ["text", "audio"], path="x") == ("text", "audio")
  assert choose_modalities([], (), path="x") == ()


@pytest.mark.parametrize(
  ("found", "asked", "parts"),
  [
    ([], ["video"], ["folder", "some of those found, none", "got 'video'", "video_features.npy"]),
    (["text", "image"], ["video"], ["folder", "image, text", "got 'video'", "video_features.npy"]),
    (["text"], ["text", "text"], ["--config.data.modalities", "expected different names", "got text, text"]),
  ],
  ids=["none", "unknown", "twice"],
)
def test_a_bad_choice_of_modalities_is_refused(found, asked, parts):
  refusal(lambda: choose_modalities(found, asked, path="folder"), *parts)


def test_modalities_of_a_folder(tmp_path):
  save(tmp_path, make(), "text_features.npy")
  save(tmp_path, 2 * make(), "audio_features.npy")
  save(tmp_path, np.arange(NUM_ITEMS) < 2, "has_audio.npy")
  save(tmp_path, make(), "sid_text.npy")
  table = {"color": make()}
  features, present = load_modalities(tmp_path, (), num_items=NUM_ITEMS, in_tables=table)
  assert list(features) == list(present) == ["audio", "color", "text"]
  np.testing.assert_array_equal(features["audio"], 2 * make())
  assert {name: int(mask.sum()) for name, mask in present.items()} == {"audio": 2, "color": 6, "text": 6}
  refusal(
    lambda: load_modalities(tmp_path, (), num_items=NUM_ITEMS, in_tables={"text": make()}),
    "text_features.npy",
    "expected each modality once",
  )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_standardization_is_over_present_rows(dtype):
  array = make(dtype)
  array[:, 2] = 0.1  # Constant, and not exact in binary.
  array[4] = 1e4  # Absent: must not count.
  present = np.arange(NUM_ITEMS) != 4
  mean, std = standardization(array, present)
  there = array[present].astype(np.float64)
  np.testing.assert_allclose(mean, there.mean(axis=0), rtol=1e-6)
  np.testing.assert_allclose(std[:2], there.std(axis=0)[:2], rtol=1e-6)
  assert std[2] == 1.0
  assert mean.dtype == std.dtype == (np.float64 if dtype == np.float64 else np.float32)


def test_standardization_sees_a_small_spread_around_a_large_mean():
  array = 1e4 + np.random.default_rng(0).normal(size=(NUM_ITEMS, 3))
  _, std = standardization(array, np.ones(NUM_ITEMS, bool))
  np.testing.assert_allclose(std, array.std(axis=0), rtol=1e-6)


@pytest.mark.parametrize(
  ("centre", "scale", "dtype"),
  [
    (0, 1, np.float32), (100, 1, np.float32), (1e4, 0.1, np.float64), (0, 1e37, np.float64), (0, 1e-42, np.float64),
    (3e38, 0, np.float32), (1.7e9, 1e4, np.float64),
  ],
)  # fmt: skip
def test_columns_that_float32_would_blur_are_standardised_in_float64(centre, scale, dtype):
  array = (centre + scale * np.random.default_rng(0).normal(size=(NUM_ITEMS, 3))).astype(np.float32)
  mean, std = standardization(array, np.ones(NUM_ITEMS, bool))
  assert mean.dtype == std.dtype == dtype
  assert np.isfinite(mean).all()
  assert (std > 0).all()


def test_features_hash_is_of_the_content_not_of_the_blocks_or_the_order(monkeypatch):
  present = np.any(make(), axis=1)
  one = features_hash({"a": make(), "b": 2 * make()}, {"a": present, "b": present})
  monkeypatch.setattr(features_module, "BLOCK", 10**6)
  fortran = np.asfortranarray(2 * make())
  assert features_hash({"b": fortran, "a": make()}, {"b": present, "a": present}) == one
  assert len(one) == 16
  assert int(one, 16) >= 0


@pytest.mark.parametrize(
  ("array", "present", "name"),
  [
    (with_value(9.0), np.ones(NUM_ITEMS, bool), "a"),
    (make(), np.arange(NUM_ITEMS) > 0, "a"),
    (make(), np.ones(NUM_ITEMS, bool), "b"),
    (make().astype(np.float64), np.ones(NUM_ITEMS, bool), "a"),
    (make().reshape(3, NUM_ITEMS), np.ones(NUM_ITEMS, bool), "a"),
  ],
  ids=["value", "mask", "name", "dtype", "shape"],
)
def test_features_hash_changes_with(array, present, name):
  base = features_hash({"a": make()}, {"a": np.ones(NUM_ITEMS, bool)})
  assert features_hash({name: array}, {name: present}) != base


def mapped_bytes():
  """Resident pages of files and shared memory; Linux alone tells them apart."""
  status = pathlib.Path("/proc/self/status")
  if not status.exists():
    pytest.skip("no /proc")
  lines = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines())
  return int(lines["RssFile"].split()[0]) * 1024


def test_released_pages_leave_the_process_and_can_be_read_again(tmp_path):
  array = np.random.default_rng(0).normal(size=(2**12, 2**11)).astype(np.float32)
  mapped = np.load(save(tmp_path, array), mmap_mode="r")
  before = mapped_bytes()
  total = float(mapped.sum(dtype=np.float64))
  grown = mapped_bytes() - before
  assert grown > 0.9 * array.nbytes
  release(mapped[5:])  # A view will do.
  assert mapped_bytes() - before < 0.1 * array.nbytes
  assert float(mapped.sum(dtype=np.float64)) == total


def test_a_store_does_not_keep_what_it_has_read_of_a_mapped_file(tmp_path, monkeypatch):
  monkeypatch.setattr(features_module, "BLOCK", 2**20)
  monkeypatch.setattr(feature_store, "_MAPPED", 2**22)
  array = np.random.default_rng(0).normal(size=(2**12, 2**11)).astype(np.float32)
  mapped = np.load(save(tmp_path, array), mmap_mode="r")
  before = mapped_bytes()
  store = feature_store.FeatureStore({"text": mapped}, {"text": np.ones(len(array), bool)})
  rows = [store.rows(np.arange(first, first + 256))[0]["text"] for first in range(0, len(array), 256)]
  assert mapped_bytes() - before < 0.5 * array.nbytes
  mean, std = array.mean(axis=0, dtype=np.float64), array.std(axis=0, dtype=np.float64)
  np.testing.assert_allclose(np.concatenate(rows), (array - mean) / std, atol=1e-4)


@pytest.mark.parametrize("mode", ["c", "r+"])
def test_what_was_written_into_a_mapped_array_is_not_let_go(tmp_path, mode):
  path = save(tmp_path, make())
  mapped = np.load(path, mmap_mode=mode)
  mapped[0] = 7.0
  release(mapped)
  assert (mapped[0] == 7.0).all()


def test_releasing_an_array_in_memory_does_nothing():
  array = make()
  release(array[2:])
  np.testing.assert_array_equal(array, make())
