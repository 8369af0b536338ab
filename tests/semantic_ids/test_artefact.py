"""The artefact on disk: what is saved is what is loaded, and nothing else is."""

import dataclasses
import os
import pickle
import re

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.errors import InputError
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.utils.json_files import read_json, write_json

ARRAYS = ("codes", "stream_codes", "present", "codebooks")


def make():
  rng = np.random.default_rng(0)
  return SemanticIds(
    streams=("text", "image", "id", "fused"),
    codes=rng.integers(5, size=(6, 3)).astype(np.int32),
    stream_codes=rng.integers(5, size=(4, 6, 3)).astype(np.int32),
    present=rng.random((4, 6)) < 0.6,
    codebooks=rng.normal(size=(1, 3, 5, 2)).astype(np.float32),
    data_hash="0123abcd",
    item_ids=ItemIds([f"sku-{item}" for item in range(6)]),
    settings={"num_levels": 3, "hidden": [8], "repair": "reassign"},
    encoder={"mean/text": np.arange(3.0), "params/a/kernel": np.eye(2, dtype=np.float32)},
  )


@pytest.fixture
def folder(tmp_path):
  make().save(tmp_path / "ids")
  return tmp_path / "ids"


def test_loading_gives_back_what_was_saved(folder):
  ids, loaded = make(), SemanticIds.load(folder)
  assert (loaded.streams, loaded.data_hash, loaded.fingerprint) == (ids.streams, ids.data_hash, ids.fingerprint)
  for name in ARRAYS:
    assert_array_equal(getattr(loaded, name), getattr(ids, name), strict=True)
  assert loaded.item_ids.to_json() == ids.item_ids.to_json()
  assert loaded.settings == ids.settings
  assert loaded.encoder.keys() == ids.encoder.keys()
  for name, array in ids.encoder.items():
    assert_array_equal(loaded.encoder[name], array, strict=True)


def test_every_array_is_readable_without_pickle(folder):
  assert {path.name for path in folder.iterdir()} == {f"{name}.npy" for name in ARRAYS} | {
    "semantic_ids.json",
    "encoder.npz",
    "item_ids.json",
  }
  for name in ARRAYS:
    assert_array_equal(np.load(folder / f"{name}.npy", allow_pickle=False), getattr(make(), name))


def test_it_exists_only_once_its_last_file_is_written(folder, tmp_path):
  assert SemanticIds.exists(folder)
  assert not SemanticIds.exists(tmp_path / "elsewhere")
  (folder / "semantic_ids.json").unlink()
  assert not SemanticIds.exists(folder)


def test_modalities_are_the_streams_that_are_neither_id_nor_fused():
  assert make().modalities == ("text", "image")


@pytest.mark.parametrize("shared", [True, False])
def test_vectors_are_sums_of_codewords_and_zero_where_the_stream_is_absent(shared):
  ids = make()
  if not shared:
    own = np.random.default_rng(1).normal(size=(4, 3, 5, 2)).astype(np.float32)
    ids = dataclasses.replace(ids, codebooks=own)
  assert ids.num_codes == 5
  for s, stream in enumerate(ids.streams):
    vectors = ids.vectors(stream)
    assert vectors.dtype == np.float32
    for item in range(6):
      expected = sum(ids.codebooks[0 if shared else s, n, ids.stream_codes[s, item, n]] for n in range(3))
      np.testing.assert_allclose(vectors[item], expected if ids.present[s, item] else 0.0, atol=1e-6)


@pytest.mark.parametrize(
  "change",
  [
    lambda ids: {"codes": ids.codes + np.eye(6, 3, dtype=np.int32)},
    lambda ids: {"stream_codes": ids.stream_codes[::-1]},
    lambda ids: {"present": ~ids.present},
    lambda ids: {"codebooks": np.nextafter(ids.codebooks, np.float32(9))},
    lambda ids: {"data_hash": "0123abce"},
    lambda ids: {"settings": ids.settings | {"hidden": [9]}},
    lambda ids: {"encoder": ids.encoder | {"mean/text": np.arange(1.0, 4.0)}},
    lambda ids: {"encoder": {"mean/image": ids.encoder["mean/text"]}},
    lambda ids: {"streams": ("image", "text", "id", "fused")},
  ],
  ids=[
    "codes", "stream_codes", "present", "codebooks", "data_hash", "settings", "encoder", "names", "streams",
  ],
)  # fmt: skip
def test_the_fingerprint_changes_with_every_part(change):
  ids = make()
  assert re.fullmatch("[0-9a-f]{16}", ids.fingerprint)
  assert ids.fingerprint == make().fingerprint
  assert dataclasses.replace(ids, **change(ids)).fingerprint != ids.fingerprint


def refusal(folder, way_out="delete the folder and run the tokenizer again"):
  with pytest.raises(InputError) as error:
    SemanticIds.load(folder)
  assert str(folder) in str(error.value)
  assert way_out in str(error.value)
  return str(error.value)


@pytest.mark.parametrize("name", ARRAYS)
def test_a_changed_array_is_refused_with_both_fingerprints(folder, name):
  array = np.load(folder / f"{name}.npy")
  array.flat[-1] = not array.flat[-1] if array.dtype == bool else array.flat[-1] + 1
  np.save(folder / f"{name}.npy", array)
  assert make().fingerprint in refusal(folder)


def test_a_changed_encoder_is_refused_with_both_fingerprints(folder):
  np.savez(folder / "encoder.npz", **(make().encoder | {"mean/text": np.zeros(3)}))
  assert make().fingerprint in refusal(folder)


@pytest.mark.parametrize("field", ["data_hash", "fingerprint"])
def test_a_changed_description_is_refused(folder, field):
  about = read_json(folder / "semantic_ids.json")
  about[field] = "f" * 16
  write_json(folder / "semantic_ids.json", about)
  refusal(folder)


@pytest.mark.parametrize("name", [*(f"{name}.npy" for name in ARRAYS), "encoder.npz", "semantic_ids.json"])
def test_a_missing_a_truncated_and_an_empty_file_are_refused(folder, name):
  whole = (folder / name).read_bytes()
  for content in (whole[: len(whole) - 20], whole[:20], b""):
    (folder / name).write_bytes(content)
    refusal(folder)
  (folder / name).unlink()
  refusal(folder, "check the path" if name == "semantic_ids.json" else "delete the folder")


@pytest.mark.filterwarnings("ignore")  # zipfile's, of names that stand there twice.
@pytest.mark.parametrize("name", [*(f"{name}.npy" for name in ARRAYS), "encoder.npz", "semantic_ids.json"])
def test_a_flipped_bit_is_refused_or_changes_nothing(folder, name):
  whole, expected, refused = (folder / name).read_bytes(), make().fingerprint, 0
  flips = range(0, 8 * len(whole), 7)
  for place in flips:
    content = bytearray(whole)
    content[place // 8] ^= 1 << place % 8
    (folder / name).write_bytes(content)
    try:
      assert SemanticIds.load(folder).fingerprint == expected
    except InputError:
      refused += 1
  # In an archive, dates and the like may change.
  assert refused > (0.7 if name == "encoder.npz" else 0.9) * len(flips)


def test_a_folder_of_anything_else_is_refused_and_not_to_be_deleted(tmp_path):
  for folder in (tmp_path, tmp_path / "nowhere"):
    assert "delete" not in refusal(folder, "found no semantic_ids.json; check the path")


@pytest.mark.parametrize(
  ("change", "named"),
  [
    (lambda ids: {"codes": np.zeros((6, 0), np.int32)}, r"codes: expected int32 \[items, levels\]"),
    (lambda ids: {"codes": ids.codes.astype(np.int64)}, r"codes: expected int32 .* got int64"),
    (lambda ids: {"codes": ids.codes[0]}, r"codes: expected int32 \[items, levels\], got int32 \[3\]"),
    (lambda ids: {"codes": ids.codes + 5}, r"codes: expected codes in 0\.\.4"),
    (lambda ids: {"codes": ids.codes[:5]}, "expected arrays of 4 streams, 5 items and 3 levels"),
    (lambda ids: {"stream_codes": ids.stream_codes - 5}, r"stream_codes: expected codes in 0\.\.4"),
    (lambda ids: {"stream_codes": ids.stream_codes[..., :2]}, "expected arrays of 4 streams, 6 items and 3 levels"),
    (lambda ids: {"present": ids.present.astype(np.uint8)}, "present: expected bool"),
    (lambda ids: {"present": ids.present[:3]}, "expected arrays of 4 streams"),
    (lambda ids: {"codebooks": ids.codebooks * np.inf}, "codebooks: expected finite numbers"),
    (lambda ids: {"codebooks": np.tile(ids.codebooks, (2, 1, 1, 1))}, "expected arrays of 4 streams"),
    (lambda ids: {"streams": ("text", "text", "id", "fused")}, "streams: expected different names"),
    (lambda ids: {"streams": ("text", "image", "fused", "id")}, "the last of them fused"),
    (lambda ids: {"streams": ("image", "id", "fused")}, "expected arrays of 3 streams"),
    (lambda ids: {"item_ids": ItemIds.numbered(5)}, "item_ids: expected the ids of 6 items, got 5"),
  ],
)  # fmt: skip
def test_arrays_that_do_not_fit_one_another_are_refused_whatever_their_fingerprint(tmp_path, change, named):
  ids = make()
  dataclasses.replace(ids, **change(ids)).save(tmp_path / "ids")
  assert re.search(named, refusal(tmp_path / "ids"))


def test_an_extension_keeps_the_codes_of_the_known_items():
  ids = make()
  ids.check_extension(ids, where="there")
  changed = dataclasses.replace(ids, stream_codes=(ids.stream_codes + 1) % 5)
  with pytest.raises(InputError, match="there does not extend the semantic IDs"):
    changed.check_extension(ids, where="there")


def test_a_description_of_other_types_is_refused(folder):
  about = read_json(folder / "semantic_ids.json")
  for change in (
    {"streams": "text"},
    {"streams": [1, "fused"]},
    {"settings": []},
    {"data_hash": 5},
    {"fingerprint": 0},
  ):
    write_json(folder / "semantic_ids.json", about | change)
    refusal(folder)


def test_other_data_or_other_items_are_refused():
  ids = make()
  ids.check_data("0123abcd", item_ids=ids.item_ids, where="there")
  with pytest.raises(InputError, match="learned from 0123abcd, this run's split and features are 4567cdef"):
    ids.check_data("4567cdef", item_ids=ids.item_ids, where="there")
  with pytest.raises(InputError, match="there holds semantic IDs of 6 items, this run's data has 7"):
    ids.check_data("0123abcd", item_ids=ItemIds.numbered(7), where="there")
  swapped = ItemIds(["sku-0", "sku-2", "sku-1", "sku-3", "sku-4", "sku-5"])
  with pytest.raises(InputError, match="there: row 1 is item 'sku-1', expected 'sku-2'"):
    ids.check_data("0123abcd", item_ids=swapped, where="there")


def test_an_id_that_was_changed_is_no_longer_the_artefacts(tmp_path):
  folder = tmp_path / "alone"
  make().save(folder)
  names = read_json(folder / "item_ids.json")["items"]
  write_json(folder / "item_ids.json", {"items": [*names[1:], names[0]]})
  assert "fingerprint" in refusal(folder)
  write_json(folder / "item_ids.json", {"items": names[:-1] + names[:1]})
  assert "item ids that differ" in refusal(folder)


class Payload:
  """Unpickling it makes a folder, which shows that it was unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (self.path,)


def test_a_pickle_in_place_of_an_array_is_refused_and_not_run(folder, tmp_path):
  mark = str(tmp_path / "unpickled")
  (folder / "codes.npy").write_bytes(pickle.dumps(Payload(mark)))
  refusal(folder)
  np.save(folder / "codes.npy", np.array([Payload(mark)], dtype=object), allow_pickle=True)
  refusal(folder)
  assert not os.path.exists(mark)


def test_object_arrays_are_not_written(tmp_path):
  ids = dataclasses.replace(make(), codes=np.array([[object()]], dtype=object))
  with pytest.raises(ValueError, match="allow_pickle"):
    ids.save(tmp_path / "ids")
  assert not SemanticIds.exists(tmp_path / "ids")
