"""New items: what they are given, what they must not change, and what is refused."""

import dataclasses
import types

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.commands.assign import main
from bbqrec_jax.data.feature_store import FeatureStore
from bbqrec_jax.data.features import load_new_items
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.errors import InputError
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.semantic_ids.repair import reassign_collisions, suffix_collisions
from bbqrec_jax.tokenizer.inference import (
  InferenceTokenizer,
  check_arrays,
  encode_blocks,
  id_space,
  inference_parameters,
  settings_from_json,
)
from bbqrec_jax.tokenizer.kmeans import content_latents
from bbqrec_jax.tokenizer.model import Tokenizer
from bbqrec_jax.tokenizer.new_items import assign
from bbqrec_jax.tokenizer.quantizers import make_quantizer
from bbqrec_jax.tokenizer.settings import TokenizerSettings

ITEMS, LEVELS, CODES, WIDTH = 30, 2, 8, 4
MODALITIES = (("text", 8), ("image", 5))


def make_features(count, *, seed=0):
  rng = np.random.default_rng(seed)
  features = {name: rng.normal(3.0, 2.0, (count, width)).astype(np.float32) for name, width in MODALITIES}
  present = {"text": np.ones(count, bool), "image": rng.random(count) < 0.7}
  return features, present


def make_ids(random_params, *, repair="reassign", **choices):
  """An artefact as the tokenizer stage builds it, from random parameters."""
  settings = TokenizerSettings(
    MODALITIES,
    num_items=ITEMS,
    code_width=WIDTH,
    num_levels=LEVELS,
    num_codes=CODES,
    hidden=(6,),
    repair=repair,
    **choices,
  )
  if settings.quantizer == "rq_kmeans":
    settings = dataclasses.replace(settings, item_id="none", codebooks="per_stream")
  features, present = make_features(ITEMS)
  store = FeatureStore(features, present)
  if settings.quantizer == "rq_kmeans":
    params, encoder = {}, store.arrays()
  else:
    items = np.arange(1)
    example = {"items": items} | dict(zip(("features", "present"), store.rows(items), strict=True))
    params = random_params(Tokenizer(settings), example)
    encoder = inference_parameters(settings, params) | store.arrays()
  own = params["item_embedding"]["embedding"] if settings.item_id != "none" else None
  rows = store.rows(np.arange(ITEMS))
  quantizer = make_quantizer(settings)
  start = np.zeros(quantizer.codebook_shape, np.float32)
  latents, _, _ = InferenceTokenizer(settings, encoder, start)(*rows, own)
  # Codewords amid the latents, so that items are told apart at all.
  drawn = np.random.default_rng(2).permutation(ITEMS)[: LEVELS * CODES].reshape(LEVELS, CODES)
  scale = np.array([1.0, 0.3], np.float32)[:, None, None]
  books = [latents[stream][drawn] * scale for stream in range(len(settings.streams))]
  codebooks = np.stack(books if settings.codebooks == "per_stream" else books[-1:])
  codebooks = codebooks if quantizer.fixed() is None else quantizer.fixed()
  frozen = InferenceTokenizer(settings, encoder, codebooks)
  latents, here, codes = frozen(*rows, own)
  raw, id_latents, id_codebooks = id_space(settings, latents, codes, codebooks)
  if repair == "suffix":
    repaired = suffix_collisions(raw, num_codes=CODES)
  else:
    repaired = reassign_collisions(raw, id_latents, id_codebooks)
  item_ids, stored = ItemIds.numbered(ITEMS), dataclasses.asdict(settings)
  return SemanticIds(settings.streams, repaired, codes, here, codebooks, "hash", item_ids, stored, encoder)


CHOICES = [
  {},
  {"repair": "suffix"},
  {"codebooks": "per_stream", "semantic_id": "concatenated"},
  {"item_id": "none"},
  {"quantizer": "fsq"},
  {"quantizer": "rq_kmeans"},
  {"quantizer": "rq_kmeans", "semantic_id": "concatenated", "repair": "suffix"},
]


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_new_items_get_ids_of_their_own_and_no_known_item_changes(random_params, choices):
  ids = make_ids(random_params, **choices)
  features, present = make_features(12, seed=3)
  extended = assign(ids, features, present, block=7)
  assert_array_equal(extended.codes[:ITEMS], ids.codes)
  assert_array_equal(extended.stream_codes[:, :ITEMS], ids.stream_codes)
  assert_array_equal(extended.present[:, :ITEMS], ids.present)
  assert extended.codes.shape == (ITEMS + 12, ids.codes.shape[1])
  assert len(np.unique(extended.codes, axis=0)) == ITEMS + 12
  assert extended.fingerprint != ids.fingerprint
  whole = assign(ids, features, present)
  assert_array_equal(whole.codes, extended.codes)


@pytest.mark.parametrize(
  "choices", [{"item_id": "none"}, {"item_id": "none", "quantizer": "fsq"}, {"quantizer": "rq_kmeans"}], ids=str
)
def test_an_item_with_the_features_of_a_known_one_and_no_id_of_its_own_gets_its_codes(random_params, choices):
  """Some of the known ones: their own statistics are others than those of all."""
  ids = make_ids(random_params, **choices)
  features, present = make_features(ITEMS)
  some = np.array([17, 2, 29, 11, 5])
  assert not present["image"][some].all(), "no modality is absent: the example leaves that untried"
  twins = {name: array[some] for name, array in features.items()}
  extended = assign(ids, twins, {name: mask[some] for name, mask in present.items()})
  assert_array_equal(extended.stream_codes[:, ITEMS:], ids.stream_codes[:, some])
  assert_array_equal(extended.present[:, ITEMS:], ids.present[:, some])


def test_an_unseen_items_id_vector_is_the_mean_of_the_learned_ones(random_params):
  ids = make_ids(random_params)
  settings, (features, present) = settings_from_json(ids.settings), make_features(4, seed=5)
  example = {"items": np.arange(4), "features": features, "present": present}
  learned = random_params(Tokenizer(settings), example)["item_embedding"]["embedding"]
  assert learned.shape == (ITEMS, WIDTH)
  latents, _, _ = InferenceTokenizer(settings, ids.encoder, ids.codebooks)(features, present)
  assert_allclose(latents[ids.streams.index("id")], np.tile(learned.mean(axis=0), (4, 1)), rtol=1e-5)


def test_loaded_from_disk_it_assigns_the_same(random_params, tmp_path):
  ids = make_ids(random_params)
  ids.save(tmp_path / "ids")
  new = make_features(9, seed=2)
  assert_array_equal(assign(SemanticIds.load(tmp_path / "ids"), *new).codes, assign(ids, *new).codes)


def test_other_modalities_or_widths_are_refused_with_both(random_params):
  ids = make_ids(random_params)
  features, present = make_features(3)
  with pytest.raises(InputError, match=r"'text': 8, 'image': 5.*have \{'text': 8\}"):
    assign(ids, {"text": features["text"]}, {"text": present["text"]})
  with pytest.raises(InputError, match=r"'text': 8.*'text': 7"):
    assign(ids, features | {"text": features["text"][:, :7]}, present)


@pytest.fixture(scope="module")
def one_artefact(random_params):
  return make_ids(random_params)


@pytest.mark.parametrize(
  ("setting", "value"),
  [
    ("modalities", [["text", 8]]), ("modalities", [["text", 8], ["../x", 5]]), ("modalities", [["text", 0]]),
    ("modalities", "text"), ("modalities", []), ("hidden", [10**9]), ("hidden", [6] * 10**4), ("hidden", 6),
    ("num_levels", 10**9), ("num_codes", True), ("code_width", "4"), ("item_id", "no such"), ("item_id", "none"),
    ("semantic_id", "concatenated"), ("quantizer", "os:system"), ("quantizer", "rq_kmeans"), ("quantizer", "fsq"),
    ("codebooks", "per_stream"), ("temperature", None), ("repair", "suffix"), ("repair", "none"),
    ("history_layers", 10**12), ("code_width", 0), ("num_codes", 0),
  ],
)  # fmt: skip
def test_settings_that_are_not_of_the_arrays_are_refused_before_anything_is_computed(one_artefact, setting, value):
  forged = dataclasses.replace(one_artefact, settings={**one_artefact.settings, setting: value})
  with pytest.raises(InputError, match=r"train it again|train the tokenizer again|trained on modalities|--trust=os"):
    assign(forged, *make_features(3))


@pytest.mark.parametrize("field", ["modalities", "num_items"])
def test_settings_that_lack_a_field_are_refused(one_artefact, field):
  with pytest.raises(InputError, match=f"tokenizer setting {field} is missing"):
    settings_from_json({name: value for name, value in one_artefact.settings.items() if name != field})


def test_an_encoder_that_does_not_fit_is_refused_by_the_name_of_the_array(one_artefact):
  ids = one_artefact
  settings = settings_from_json(ids.settings)
  check_arrays(settings, ids.encoder, ids.codebooks)
  for name, array in ids.encoder.items():
    of_features = name.startswith(("mean", "deviation"))
    bad = [array[..., :-1], array.astype(np.float16 if of_features else np.float64), array * np.nan]
    bad += [np.zeros_like(array)] if name.startswith("deviation") else []
    if of_features:
      check_arrays(settings, {**ids.encoder, name: array.astype(np.float64)}, ids.codebooks)
    for changed in bad:
      with pytest.raises(InputError, match=f"array '{name}': expected finite float32"):
        check_arrays(settings, {**ids.encoder, name: changed}, ids.codebooks)
    with pytest.raises(InputError, match=f"array '{name}' is missing"):
      check_arrays(settings, {other: array for other, array in ids.encoder.items() if other != name}, ids.codebooks)
  with pytest.raises(InputError, match="array 'extra' is not needed"):
    check_arrays(settings, {**ids.encoder, "extra": np.ones(1, np.float32)}, ids.codebooks)
  with pytest.raises(InputError, match="array 'codebooks'"):
    check_arrays(settings, ids.encoder, ids.codebooks[:, :1])


def test_more_items_than_ids_are_refused(random_params):
  with pytest.raises(InputError, match=r"65 items.*2 levels of 8 codes make 64"):
    assign(make_ids(random_params), *make_features(35))


def test_the_command_line_writes_an_artefact_of_all_items(random_params, tmp_path, monkeypatch, capsys):
  ids = make_ids(random_params)
  ids.save(tmp_path / "ids")
  features, _ = make_features(6, seed=4)
  folder = tmp_path / "new"
  folder.mkdir()
  features["image"][2] = 0.0
  features["text"][5, 3] = 1e4
  for name, array in features.items():
    np.save(folder / f"{name}_features.npy", array)

  options = types.SimpleNamespace(tokenizer=tmp_path / "ids", features=folder, output=tmp_path / "out", trust=[])
  monkeypatch.setattr("bbqrec_jax.commands.assign.quiet_flags", lambda: options)
  main(["assign"])
  written = SemanticIds.load(tmp_path / "out")
  assert len(written.codes) == ITEMS + 6
  assert not written.present[written.streams.index("image"), ITEMS + 2]
  said = capsys.readouterr().out
  assert "6 new items after 30 known ones" in said
  assert "warning: text features of 1 of 6 new items are like no known item's: row 5 column 3 is" in said
  files = sorted(tmp_path.rglob("*"))
  monkeypatch.setattr("bbqrec_jax.tokenizer.new_items.assign", lambda *arguments: pytest.fail("nothing is computed"))
  note = folder / "image_features.npy"
  for output, complaint in (
    *((path, f"{path} exists already: choose another --output") for path in (options.output, folder, tmp_path / "ids")),
    (note / "x", f"--output={note / 'x'}: expected a folder, or a place for one, but {note} is none; use another"),
  ):
    options.output = output
    with pytest.raises(SystemExit) as error:
      main(["assign"])
    assert error.value.code == 2
    assert capsys.readouterr().err == f"error: {complaint}\n"
  assert sorted(tmp_path.rglob("*")) == files


def test_new_items_without_a_modality_file_or_with_unequal_rows_are_refused(tmp_path):
  widths = dict(MODALITIES)
  np.save(tmp_path / "text_features.npy", np.ones((3, 8), np.float32))
  with pytest.raises(InputError, match=r"image_features\.npy: .*found nothing.* write zeros of shape \[items, 5\]"):
    load_new_items(tmp_path, widths)
  np.save(tmp_path / "image_features.npy", np.ones((2, 5), np.float32))
  with pytest.raises(InputError, match=r"image_features\.npy: expected 3 rows.*got 2"):
    load_new_items(tmp_path, widths)
  np.save(tmp_path / "image_features.npy", np.ones((3, 4), np.float32))
  with pytest.raises(InputError, match=r"image_features\.npy: expected rows of 5 numbers.*got 4"):
    load_new_items(tmp_path, widths)
  for name, width in MODALITIES:
    np.save(tmp_path / f"{name}_features.npy", np.zeros((3, width), np.float32))
  with pytest.raises(InputError, match="expected features of some new items, got none in any of text, image"):
    load_new_items(tmp_path, widths)
  np.save(tmp_path / "has_txt.npy", np.ones(3, bool))
  with pytest.raises(InputError, match=r"has_txt\.npy: expected txt_features\.npy beside it"):
    load_new_items(tmp_path, widths)
  (tmp_path / "has_txt.npy").unlink()
  np.save(tmp_path / "text_features.npy", np.ones((0, 8), np.float32))
  with pytest.raises(InputError, match="expected a row for each new item, got none"):
    load_new_items(tmp_path, widths)


@pytest.mark.parametrize("by", ["zeros", "mask"])
@pytest.mark.parametrize("choices", [{}, {"quantizer": "rq_kmeans"}], ids=str)
def test_new_items_may_all_lack_a_modality(random_params, tmp_path, by, choices):
  ids = make_ids(random_params, **choices)
  features, _ = make_features(6, seed=3)
  features["image"] = np.zeros((6, 5), np.float32)
  if by == "mask":
    features["image"] = np.full((6, 5), np.nan)
    np.save(tmp_path / "has_image.npy", np.zeros(6, bool))
  for name, array in features.items():
    np.save(tmp_path / f"{name}_features.npy", array)
  extended = assign(ids, *load_new_items(tmp_path, dict(MODALITIES)))
  here = {"text": np.ones(6, bool), "image": np.zeros(6, bool)}
  assert_array_equal(extended.present[ids.streams.index("image"), ITEMS:], here["image"])
  features["image"] = np.zeros((6, 5), np.float32)
  assert_array_equal(extended.codes, assign(ids, features, here).codes)
  # Each as if it alone lacked the modality.
  more = {name: np.concatenate([array, make_features(1)[0][name]]) for name, array in features.items()}
  both = assign(ids, more, {name: np.append(mask, True) for name, mask in here.items()})
  assert_array_equal(both.stream_codes[:, ITEMS : ITEMS + 6], extended.stream_codes[:, ITEMS:])


def test_content_latents_are_scaled_features_each_in_its_own_columns():
  features, present = make_features(5)
  values, masks = content_latents(features, present)
  assert values.shape == (3, 5, 13)
  image = np.where(present["image"][:, None], features["image"], 0) / np.sqrt(5)
  assert_allclose(values[2], np.concatenate([features["text"] / np.sqrt(8), image], axis=1), rtol=1e-6)
  assert_array_equal(values[0, :, 8:], 0)
  here = present["image"]
  assert_array_equal(values[1][here, :8], 0)
  assert_array_equal(values[1][~here], values[2][~here])
  assert_array_equal(masks, [present["text"], here, np.ones(5, bool)])


def test_concatenated_ids_are_a_residual_quantization_in_the_product_space(random_params):
  ids = make_ids(random_params, codebooks="per_stream", semantic_id="concatenated")
  settings = settings_from_json(ids.settings)
  rng = np.random.default_rng(0)
  latents = rng.normal(size=(4, ITEMS, WIDTH)).astype(np.float32)
  codes, joined, codebooks = id_space(settings, latents, ids.stream_codes, ids.codebooks)
  assert codes.shape == (ITEMS, 2 * LEVELS)
  assert_array_equal(codes[:, :LEVELS], ids.stream_codes[0])
  assert_array_equal(codes[:, LEVELS:], ids.stream_codes[1])
  decoded = sum(codebooks[level][codes[:, level]] for level in range(2 * LEVELS))
  expected = [sum(ids.codebooks[s, n][ids.stream_codes[s][:, n]] for n in range(LEVELS)) for s in range(2)]
  assert_allclose(decoded, np.concatenate(expected, axis=1), rtol=1e-6)
  assert_array_equal(joined, np.concatenate([latents[0], latents[1]], axis=1))


def test_blocks_of_one_shape_are_joined_in_order():
  shapes = []

  def encode(items):
    shapes.append(len(items))
    return items[None, :, None] * 1.0, items[None] % 2 == 0, items[None, :, None]

  latents, present, codes = encode_blocks(encode, 10, block=4)
  assert shapes == [4, 4, 4]
  for array in (latents[0, :, 0], codes[0, :, 0]):
    assert_array_equal(array, np.arange(10))
  assert_array_equal(present[0], np.arange(10) % 2 == 0)
