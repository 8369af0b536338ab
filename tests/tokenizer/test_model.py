"""The tokenizer's losses: what each sees, what it moves, and what must not touch it."""

import contextlib
import dataclasses
import functools
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.errors import InputError
from bbqrec_jax.ops.club import club_full
from bbqrec_jax.ops.quantize import residual_quantize
from bbqrec_jax.ops.reduction import masked_mean
from bbqrec_jax.tokenizer.club import ClubNetwork
from bbqrec_jax.tokenizer.encoders import MLP, Encoder
from bbqrec_jax.tokenizer.losses import tokenizer_loss
from bbqrec_jax.tokenizer.model import Tokenizer, by_codebook, stream_codebooks
from bbqrec_jax.tokenizer.parts import try_parts
from bbqrec_jax.tokenizer.quantizers import ResidualQuantizer
from bbqrec_jax.tokenizer.settings import LossWeights, TokenizerSettings

ITEMS, LEVELS, CODES, WIDTH = 12, 2, 4, 6
MODALITIES = ("text", "image")
SETTINGS = TokenizerSettings(
  modalities=(("text", 5), ("image", 3)), num_items=ITEMS, code_width=WIDTH, num_levels=LEVELS, num_codes=CODES,
  hidden=(7,), temperature=0.5, history_layers=1, history_heads=2, max_length=6, dropout=0.3,
  own_loss=f"{__name__}:far_from_one",
)  # fmt: skip
WITHOUT_ID = replace(SETTINGS, item_id="none")
# Items 0..7 occur in histories, 8 and 9 at padding alone, 10 and 11 in the catalogue sample alone.
# The last row is full, so that a history ends with it.
HISTORY = np.array([[0, 1, 2, 3, 4, 8], [5, 6, 7, 1, 9, 8], [4, 0, 6, 5, 3, 1]])
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [3, 3, 3, 3, 0, 0], [4, 4, 4, 4, 4, 4]])
POSITIONS = np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 5]])
SAMPLE = np.array([10, 3, 0, 11, 6, 9, 2])
NETWORK = ClubNetwork(MODALITIES, WIDTH)
LOSSES = tuple(field.name for field in dataclasses.fields(LossWeights))
ONES = LossWeights(**dict.fromkeys(LOSSES, 1.0))


def only(name):
  return LossWeights(**{field: float(field == name) for field in LOSSES})


def far_from_one(rows):
  """A custom loss."""
  return jnp.mean(jnp.square(rows.quantized["fused"] - 1.0), axis=-1)


def make_batch(*, missing=0.0, seed=0):
  """A batch of which some items lack a modality; `missing` stands in the features that they do not have."""
  rng = np.random.default_rng(seed)
  features = {name: rng.normal(size=(ITEMS, width)).astype(np.float32) for name, width in SETTINGS.modalities}
  present = {"text": np.arange(ITEMS) % 5 != 2, "image": np.arange(ITEMS) % 4 != 3}
  features = {name: np.where(present[name][:, None], value, np.float32(missing)) for name, value in features.items()}
  return {
    "items": SAMPLE,
    "features": {name: value[SAMPLE] for name, value in features.items()},
    "present": {name: value[SAMPLE] for name, value in present.items()},
    "history_items": HISTORY,
    "history_features": {name: value[HISTORY] for name, value in features.items()},
    "history_present": {name: value[HISTORY] for name, value in present.items()},
    "segments": SEGMENTS,
    "positions": POSITIONS,
  }


@pytest.fixture(scope="module")
def batch():
  return make_batch()


@pytest.fixture(scope="module")
def params(random_params, batch):
  return random_params(Tokenizer(SETTINGS), batch)


@pytest.fixture(scope="module")
def run(random_params):
  """(params, batch, weights, quantized) -> (loss, output, gradient), one compiled program for each setting."""
  network = random_params(NETWORK, {name: jnp.zeros((1, WIDTH)) for name in MODALITIES}, seed=1)

  def bound(quantized, specific, present):
    predicted = NETWORK.apply({"params": network}, quantized)
    return sum(club_full(*predicted[name], specific[name], present[name]) for name in MODALITIES)

  @functools.partial(jax.jit, static_argnames="settings")
  def compiled(params, batch, weights, quantized, settings):
    # Weights are traced, so that others need no other program.
    model = Tokenizer(replace(settings, weights=LossWeights(**weights)))

    def loss(params):
      return tokenizer_loss(model, params, batch, quantized=quantized, bound=bound)

    (value, output), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return value, output, gradient

  def call(params, batch, *, weights=ONES, quantized=True, settings=SETTINGS):
    return jax.device_get(compiled(params, batch, vars(weights), quantized, settings))

  return call


@functools.partial(jax.jit, static_argnames=("settings", "method"))
def call(settings, method, params, *args):
  return Tokenizer(settings).apply({"params": params}, *args, method=method)


def latents(params, batch, settings=SETTINGS):
  return call(settings, "latents", params, batch["items"], batch["features"], batch["present"])


def assert_trees_equal(first, second):
  jax.tree.map(assert_array_equal, first, second)


def moved(gradient):
  """Names of the parameter groups that a gradient moves."""
  return {name for name, part in gradient.items() if any(np.any(leaf) for leaf in jax.tree.leaves(part))}


def layer_norm(x):
  x = np.asarray(x, np.float64)
  x = x - x.mean(axis=-1, keepdims=True)
  return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6)


def test_fused_latent_is_the_normalised_mean_of_the_present_modalities_plus_the_item_id(params, batch):
  values, present = latents(params, batch)
  assert SETTINGS.streams == ("text", "image", "id", "fused")
  masks = np.stack([batch["present"][name] for name in MODALITIES])
  assert {tuple(column) for column in masks.T.tolist()} == {(True, True), (True, False), (False, True)}
  assert_array_equal(present, [*masks, *np.ones((2, len(SAMPLE)), bool)])
  assert_array_equal(values[2], params["item_embedding"]["embedding"][SAMPLE])
  mean = (np.asarray(values[:2]) * masks[..., None]).sum(axis=0) / masks.sum(axis=0)[:, None]
  assert_allclose(values[3], layer_norm(mean + np.asarray(values[2])), atol=1e-5)


def test_an_item_of_no_modality_is_its_id_alone(params, batch):
  absent = batch | {"present": {name: np.zeros(len(SAMPLE), bool) for name in MODALITIES}}
  values, _ = latents(params, absent)
  assert_allclose(values[3], layer_norm(values[2]), atol=1e-5)


def test_the_latents_of_modalities_are_the_layer_norm_of_what_their_encoders_give(params, batch):
  values, present = latents(params, batch)
  for index, name in enumerate(MODALITIES):
    plain = MLP((*SETTINGS.hidden, WIDTH)).apply(
      {"params": params[f"behaviour_encoders_{name}"]}, batch["features"][name]
    )
    here = np.asarray(present)[index]
    assert_allclose(np.asarray(values)[index][here], layer_norm(plain)[here], atol=1e-5)


def test_specific_latents_have_zero_mean_and_unit_variance(params, batch):
  specific = call(SETTINGS, "specific", params, batch["features"])
  assert set(specific) == set(MODALITIES)
  for rows in specific.values():
    assert_allclose(np.mean(rows, axis=-1), np.zeros(len(SAMPLE)), atol=1e-5)
    assert_allclose(np.var(rows, axis=-1), np.ones(len(SAMPLE)), rtol=1e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_weight_changes_the_gradient_by_the_gradient_of_its_term(params, batch, run, name):
  full_loss, output, full = run(params, batch)
  loss, _, without = run(params, batch, weights=replace(ONES, **{name: 0.0}))
  alone_loss, _, alone = run(params, batch, weights=only(name))
  assert_allclose(full_loss - loss, output.terms[name], atol=1e-5)
  assert_allclose(alone_loss, output.terms[name], rtol=1e-6)
  jax.tree.map(lambda a, b, c: assert_allclose(a - b, c, atol=1e-5), full, without, alone)
  assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(alone)) > 1e-3


BEHAVIOUR = {"behaviour_encoders_text", "behaviour_encoders_image"}
SPECIFIC = {"specific_encoders_text", "specific_encoders_image"}
DECODERS = {"decoders_text", "decoders_image"}


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("reconstruction", BEHAVIOUR | SPECIFIC | DECODERS),
    ("fused_reconstruction", BEHAVIOUR | DECODERS | {"item_embedding"}),
    ("quantization", BEHAVIOUR | {"codebooks", "item_embedding"}),
    ("item_id", {"item_embedding"}),
    ("contrast", BEHAVIOUR | {"item_embedding", "history", "query"}),
    ("modality_contrast", BEHAVIOUR | {"item_embedding", "history", "query"}),
    ("disentangle", BEHAVIOUR | SPECIFIC),
    ("own", BEHAVIOUR | {"item_embedding"}),
  ],
)
def test_each_loss_moves_its_own_parameters_and_only_quantization_moves_codewords(params, batch, run, name, expected):
  assert set(params) == BEHAVIOUR | SPECIFIC | DECODERS | {"codebooks", "item_embedding", "history", "query"}
  _, _, gradient = run(params, batch, weights=only(name))
  assert moved(gradient) == expected


GIVEN = []


def watched(rows):
  """A custom loss that keeps what it is given, outside of any compiled program."""
  GIVEN.append(rows)
  return jnp.arange(len(rows.items), dtype=jnp.float32)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_custom_loss_is_given_what_the_tokenizer_makes_of_the_items(params, batch, quantized):
  settings = replace(SETTINGS, own_loss=f"{__name__}:watched", weights=replace(only("own"), own=3.0))

  @jax.jit
  def run(params, batch):
    GIVEN.clear()
    return *tokenizer_loss(Tokenizer(settings), params, batch, quantized=quantized), GIVEN[0]

  loss, output, rows = run(params, batch)
  assert_allclose(output.terms["own"], (len(SAMPLE) - 1) / 2)
  assert_allclose(loss, 3 * (len(SAMPLE) - 1) / 2)
  made = latents(params, batch)
  assert_array_equal(rows.items, SAMPLE)
  assert_trees_equal(rows.features, batch["features"])
  specific = call(SETTINGS, "specific", params, batch["features"])
  codebooks = np.asarray(stream_codebooks(SETTINGS, params["codebooks"]))
  for index, name in enumerate(SETTINGS.streams):
    assert_array_equal(rows.present[name], made.present[index])
    assert_allclose(rows.latents[name], made.values[index], atol=1e-6)
    assert_array_equal(rows.codes[name], output.codes[index])
    codewords = sum(codebooks[index, level][rows.codes[name][:, level]] for level in range(LEVELS))
    assert_allclose(rows.quantized[name], codewords if quantized else made.values[index], atol=1e-5)
  for name in MODALITIES:
    assert_allclose(rows.specific[name], specific[name], atol=1e-6)


class Linear(Encoder):
  """A custom encoder, of one layer."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(self.widths[-1])(x)


class Wide(Linear):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(self.widths[-1] + 1)(x)


def margin(queries, targets, target_ids, valid, *, temperature, axis_name):
  """A custom contrast: the mean distance of a state from its target, beyond the temperature."""
  distance = jnp.sum(jnp.square(queries - targets), axis=-1)
  loss = masked_mean(jax.nn.relu(distance - temperature), valid, axis_name=axis_name)
  return loss, {"accuracy": jnp.zeros((), jnp.float32)}


def no_mean(queries, *rest, **options):
  return queries[:, 0], {"accuracy": jnp.zeros((), jnp.float32)}


def numberless(rows):
  return jnp.zeros((len(rows.items), 2))


def test_a_custom_encoder_and_contrast_are_what_the_losses_are_taken_of(random_params, batch):
  settings = replace(SETTINGS, encoder=f"{__name__}:Linear", contrast=f"{__name__}:margin")
  try_parts(settings, batch_items=len(SAMPLE))
  params = random_params(Tokenizer(settings), batch)
  assert params["behaviour_encoders_text"]["Dense_0"]["kernel"].shape == (5, WIDTH)
  _, output = jax.jit(functools.partial(tokenizer_loss, Tokenizer(settings)))(params, batch)
  _, plain = jax.jit(functools.partial(tokenizer_loss, Tokenizer(replace(settings, contrast="info_nce"))))(
    params, batch
  )
  assert output.terms["contrast"] != plain.terms["contrast"]
  assert output.terms["reconstruction"] == plain.terms["reconstruction"]


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"own_loss": "watched"}, ""),
    ({"own_loss": "numberless"}, r"own_loss: expected a number per item, \[7\], got an array of shape \[7, 2\]"),
    ({"encoder": "Wide"}, r"tokenizer\.encoder = .*Wide' breaks the contract"),
    ({"encoder": "margin"}, r"tokenizer\.encoder = .* expected a subclass of .*\.Encoder, got <function margin"),
    ({"contrast": "no_mean"}, r"tokenizer\.contrast = .*no_mean' breaks the contract .*a loss that is one number"),
    ({"contrast": "nosuch"}, r"tokenizer\.contrast: expected one of info_nce, or module:function, got"),
  ],
)
def test_custom_parts_are_tried_on_shapes_before_anything_is_trained(changes, said):
  settings = replace(SETTINGS, **{"own_loss": ""} | {name: f"{__name__}:{part}" for name, part in changes.items()})
  with pytest.raises(InputError, match=said) if said else contextlib.nullcontext():
    try_parts(settings, batch_items=len(SAMPLE))


def test_features_of_missing_modalities_change_nothing_whatever_they_hold(params, batch, run):
  _, expected, expected_gradient = run(params, batch)
  expected_loss = sum(expected.terms[name] for name in LOSSES)
  expected_latents = latents(params, batch)
  for garbage in (3.0, -1e4):
    dirty = make_batch(missing=garbage)
    assert (dirty["features"]["image"] != batch["features"]["image"]).any()
    assert (dirty["history_features"]["text"] != batch["history_features"]["text"]).any()
    loss, output, gradient = run(params, dirty)
    assert_allclose(loss, expected_loss, rtol=1e-6)
    assert_trees_equal(output.terms, expected.terms)
    assert_array_equal(output.codes, expected.codes)
    assert_trees_equal(gradient, expected_gradient)
    got = latents(params, dirty)
    assert_array_equal(np.asarray(got.values)[got.present], np.asarray(expected_latents.values)[got.present])


def test_codes_and_residuals_are_those_of_the_latents(params, batch, run):
  _, output, _ = run(params, batch)
  values, present = latents(params, batch)
  result = call(SETTINGS, "quantize", params, values)
  assert_array_equal(output.codes, result.codes)
  assert_array_equal(output.present, present)
  assert_allclose(output.residuals, result.residuals, atol=1e-6)
  assert_allclose(output.residuals[:, 0], values, atol=1e-6)
  assert_allclose(output.residuals[:, 1], values - result.codewords[:, 0], atol=1e-6)


def test_the_quantization_loss_is_the_mean_over_the_streams_that_are_present(params, batch, run):
  _, output, _ = run(params, batch)
  present = np.asarray(output.present)
  codewords = call(SETTINGS, "quantize", params, latents(params, batch).values).codewords
  squared = np.square(np.asarray(output.residuals, np.float64) - codewords).sum(axis=-1).mean(axis=1)
  # The codewords' part, and a quarter of it for the latents': both have one value.
  assert_allclose(output.terms["quantization"], 1.25 * squared[present].mean(), rtol=1e-5)
  assert output.terms["quantization"] != pytest.approx(1.25 * squared.mean(), rel=1e-3)


@pytest.mark.parametrize("quantized", [True, False])
def test_reconstruction_decodes_codewords_or_while_unquantized_the_latents_themselves(params, batch, run, quantized):
  _, output, _ = run(params, batch, quantized=quantized)
  values = latents(params, batch).values
  if quantized:
    values = call(SETTINGS, "quantize", params, values).quantized
  given = dict(zip(SETTINGS.streams, values, strict=True))
  rebuilt = call(SETTINGS, "reconstruct", params, given, call(SETTINGS, "specific", params, batch["features"]))
  expected = 0.0
  for name in MODALITIES:
    error = np.square(np.asarray(rebuilt[name], np.float64) - batch["features"][name]).mean(axis=-1)
    expected += error[batch["present"][name]].mean() / len(MODALITIES)
    assert_allclose(output.quantized[name], given[name], atol=1e-6)
  assert_allclose(output.terms["reconstruction"], expected, rtol=1e-5)


def test_codebooks_take_no_part_while_unquantized(params, batch, run):
  loss, output, gradient = run(params, batch, quantized=False)
  other_loss, _, other_gradient = run(params | {"codebooks": params["codebooks"] + 1}, batch, quantized=False)
  assert output.terms["quantization"] == 0
  assert other_loss == loss
  assert_trees_equal(other_gradient, gradient)
  assert not np.any(gradient["codebooks"])
  assert loss != run(params, batch)[0]


def test_equal_latents_in_all_streams_get_equal_codes(random_params):
  settings = replace(SETTINGS, modalities=(("text", 5), ("image", 5)), item_id="none")
  features = np.random.default_rng(2).normal(size=(len(SAMPLE), 5)).astype(np.float32)
  present = np.ones(len(SAMPLE), bool)
  batch = {
    "items": SAMPLE, "features": dict.fromkeys(MODALITIES, features), "present": dict.fromkeys(MODALITIES, present)
  }  # fmt: skip
  params = random_params(Tokenizer(settings), batch)
  params["behaviour_encoders_image"] = params["behaviour_encoders_text"]
  values = latents(params, batch, settings).values
  codes = call(settings, "quantize", params, values).codes
  assert_array_equal(codes[1], codes[0])
  assert_array_equal(codes[2], codes[0])
  assert len(np.unique(codes[0], axis=0)) > 1


def test_without_item_ids_the_numbers_of_items_do_not_matter(params, batch, run):
  assert WITHOUT_ID.streams == ("text", "image", "fused")
  own = {name: value for name, value in params.items() if name != "item_embedding"}
  needed = jax.eval_shape(Tokenizer(WITHOUT_ID).init, jax.random.key(0), batch)["params"]
  assert jax.tree.structure(own) == jax.tree.structure(needed)
  loss, output, gradient = run(own, batch, settings=WITHOUT_ID)
  assert moved(gradient) == set(own)
  assert output.terms["item_id"] == 0
  assert output.residuals.shape == (3, LEVELS, len(SAMPLE), WIDTH)
  # Another numbering that keeps apart what is apart: numbers only tell false negatives.
  renumbered = batch | {"items": (SAMPLE + 5) % ITEMS, "history_items": (HISTORY + 5) % ITEMS}
  other_loss, _, other_gradient = run(own, renumbered, settings=WITHOUT_ID)
  assert other_loss == loss
  assert_trees_equal(other_gradient, gradient)


CONTRASTS = replace(only("contrast"), modality_contrast=1.0)


def test_contrast_sees_no_item_outside_the_packed_histories(params, batch, run):
  _, expected, gradient = run(params, batch, weights=CONTRASTS)
  rows = np.abs(gradient["item_embedding"]["embedding"]).max(axis=1)
  assert_array_equal(rows > 0, np.isin(np.arange(ITEMS), HISTORY[SEGMENTS > 0]))

  # Other features in the catalogue sample: what the contrast makes of the histories stays what it was.
  sample = batch | {"features": {name: value + 1 for name, value in batch["features"].items()}}
  _, output, other = run(params, sample, weights=CONTRASTS)
  for name in ("contrast", "modality_contrast", "contrast_accuracy"):
    assert output.terms[name] == expected.terms[name]
  assert output.terms["reconstruction"] != expected.terms["reconstruction"]
  assert_trees_equal(other, gradient)


def test_contrast_is_blind_to_padding_but_not_to_a_real_position(params, batch, run):
  loss, _, gradient = run(params, batch, weights=CONTRASTS)

  def shifted(where):
    features = batch["history_features"]
    return batch | {
      "history_features": {
        name: np.where(where[..., None], x + 1, x).astype(np.float32) for name, x in features.items()
      }
    }

  padding_loss, _, padding_gradient = run(params, shifted(SEGMENTS == 0), weights=CONTRASTS)
  assert padding_loss == loss
  assert_trees_equal(padding_gradient, gradient)
  known = np.any(list(batch["history_present"].values()), axis=0)
  assert not known[1, 2], "an item of no modality: its features must not matter even at a real position"
  for row, column in np.argwhere(SEGMENTS > 0).tolist():
    where = np.zeros(SEGMENTS.shape, bool)
    where[row, column] = True
    # The gradient, not the loss: features may move within the reach of one codeword.
    _, _, other = run(params, shifted(where), weights=CONTRASTS)
    changed = any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (other, gradient)), strict=True))
    assert changed == known[row, column], (row, column)


def test_other_losses_see_the_catalogue_sample_alone(params, batch, run):
  others = replace(ONES, contrast=0.0, modality_contrast=0.0)
  loss, _, gradient = run(params, batch, weights=others)
  changed = batch | {"history_features": {name: value + 1 for name, value in batch["history_features"].items()}}
  other_loss, _, other_gradient = run(params, changed, weights=others)
  assert other_loss == loss
  assert_trees_equal(other_gradient, gradient)


def test_a_position_is_contrasted_with_the_item_that_follows_it_in_its_own_history(params, batch, run):
  """The contrast recomputed in float64 from the model's own vectors and states."""
  _, output, _ = run(params, batch)
  flat = HISTORY.reshape(-1)
  features, present = (
    {name: value.reshape(len(flat), *value.shape[2:]) for name, value in batch[part].items()}
    for part in ("history_features", "history_present")
  )
  values = call(SETTINGS, "latents", params, flat, features, present).values
  quantized = call(SETTINGS, "quantize", params, values).quantized
  vectors = (quantized[3] + values[2]).reshape(*HISTORY.shape, WIDTH)
  states = Tokenizer(SETTINGS).apply(
    {"params": params}, vectors, SEGMENTS, POSITIONS, deterministic=True, method="history_states"
  )
  pairs = [(r, t) for r, t in np.ndindex(3, 5) if SEGMENTS[r, t] and SEGMENTS[r, t] == SEGMENTS[r, t + 1]]
  assert len(pairs) == 11
  assert SEGMENTS[2, -1] == SEGMENTS[2, 0] > 0, "no row ends amid a history: the example leaves that untried"

  def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  def nce(targets, pairs):
    items = np.array([HISTORY[r, t + 1] for r, t in pairs])
    scores = unit([states[r, t] for r, t in pairs]) @ unit([targets[r, t + 1] for r, t in pairs]).T / 0.5
    losses = []
    for row in range(len(pairs)):
      kept = (items != items[row]) | (np.arange(len(pairs)) == row)
      losses.append(np.log(np.exp(scores[row, kept]).sum()) - scores[row, row])
    return np.mean(losses)

  assert_allclose(output.terms["contrast"], nce(vectors, pairs), rtol=1e-4)
  by_modality = []
  for stream, name in enumerate(MODALITIES):
    known = [(r, t) for r, t in pairs if batch["history_present"][name][r, t + 1]]
    assert len(known) < len(pairs)
    by_modality.append(nce(np.asarray(quantized[stream]).reshape(vectors.shape), known))
  assert_allclose(output.terms["modality_contrast"], np.mean(by_modality), rtol=1e-4)


def test_the_fused_codes_alone_are_asked_to_rebuild_every_modality(params, batch, run):
  _, output, _ = run(params, batch)
  fused = call(SETTINGS, "quantize", params, latents(params, batch).values).quantized[-1]
  nothing = {name: np.zeros((len(SAMPLE), WIDTH), np.float32) for name in MODALITIES}
  rebuilt = call(SETTINGS, "reconstruct", params, dict.fromkeys(MODALITIES, fused), nothing)
  expected = 0.0
  for name in MODALITIES:
    error = np.square(np.asarray(rebuilt[name], np.float64) - batch["features"][name]).mean(axis=-1)
    expected += error[batch["present"][name]].mean() / len(MODALITIES)
  assert_allclose(output.terms["fused_reconstruction"], expected, rtol=1e-5)


def test_with_every_specific_latent_withheld_they_cannot_help_reconstruction(params, batch):
  on_device = jax.tree.map(jnp.asarray, batch)

  def gradient(share):
    settings = replace(SETTINGS, specific_dropout=share, dropout=0.0, weights=only("reconstruction"))

    def loss(params):
      return tokenizer_loss(Tokenizer(settings), params, on_device, key=jax.random.key(0))[0]

    return moved(jax.jit(jax.grad(loss))(params))

  assert gradient(1.0) == BEHAVIOUR | DECODERS
  assert gradient(0.5) == BEHAVIOUR | SPECIFIC | DECODERS


def test_an_item_seen_by_a_prefix_of_its_codewords_is_seen_by_its_first_and_without_the_last(params, batch):
  on_device = jax.tree.map(jnp.asarray, batch)

  @functools.partial(jax.jit, static_argnames="share")
  def contrast(codebooks, share):
    settings = replace(SETTINGS, level_dropout=share, dropout=0.0, weights=only("contrast"))
    return tokenizer_loss(Tokenizer(settings), params | {"codebooks": codebooks}, on_device, key=jax.random.key(0))[0]

  codebooks = jnp.asarray(params["codebooks"])
  assert LEVELS == 2, "a prefix of three levels may be of one or of two"
  prefix, whole = contrast(codebooks, 1.0), contrast(codebooks, 0.0)
  assert prefix != whole
  # One offset for all codewords of the last level: the choices stay what they are.
  moved = codebooks.at[:, -1].add(0.5)
  assert contrast(moved, 1.0) == prefix
  assert contrast(moved, 0.0) != whole
  # A last level of zeros adds nothing to the first.
  assert_allclose(prefix, contrast(codebooks.at[:, -1].set(0.0), 0.0), rtol=1e-6)


def test_the_item_id_term_is_the_mean_squared_norm_of_the_sampled_ids(params, batch, run):
  _, output, _ = run(params, batch)
  ids = np.asarray(params["item_embedding"]["embedding"])[SAMPLE]
  assert_allclose(output.terms["item_id"], np.square(ids).sum(axis=1).mean(), rtol=1e-6)


def test_a_row_that_lacks_a_modality_has_its_fused_latent_there(params, batch):
  values, present = latents(params, batch)
  present = np.asarray(present)
  assert (~present).any()
  for stream in range(len(SETTINGS.streams)):
    absent = ~present[stream]
    assert_array_equal(np.asarray(values)[stream][absent], np.asarray(values)[-1][absent])


@pytest.mark.parametrize("codebooks", ["shared", "per_stream"])
def test_each_stream_is_quantized_with_the_codebooks_that_serve_it(batch, random_params, codebooks):
  settings = replace(SETTINGS, codebooks=codebooks)
  params = random_params(Tokenizer(settings), batch)
  assert params["codebooks"].shape == settings.codebook_shape
  assert settings.codebook_shape[:2] == {"shared": (1, 2), "per_stream": (4, 2)}[codebooks]
  values = latents(params, batch, settings).values
  result = call(settings, "quantize", params, values)
  books = np.asarray(stream_codebooks(settings, params["codebooks"]))
  assert books.shape == (4, LEVELS, CODES, WIDTH)
  for stream in range(4):
    alone = residual_quantize(values[stream], jnp.asarray(books[stream]))
    assert_array_equal(result.codes[stream], alone.codes)
    for name in ("quantized", "residuals", "codewords"):
      assert_allclose(getattr(result, name)[stream], getattr(alone, name), atol=1e-6)
  sorted_rows = by_codebook(settings, result.residuals)
  assert sorted_rows.shape[:2] == settings.codebook_shape[:2]
  assert_allclose(np.sort(sorted_rows.reshape(-1)), np.sort(np.asarray(result.residuals).reshape(-1)))
  for level in range(LEVELS):
    rows = np.asarray(sorted_rows)[-1, level]
    wanted = np.asarray(result.residuals)[-1, level]
    assert all(np.any(np.all(rows == row, axis=-1)) for row in wanted)


class Zeros(ResidualQuantizer):
  """A quantizer of one's own: every latent gets the codes of nothing."""

  def encode(self, latents, codebooks):
    fixed = residual_quantize(jnp.zeros_like(latents), codebooks)
    return fixed._replace(residuals=jnp.broadcast_to(latents, fixed.residuals.shape))


def test_another_quantizer_is_a_class_by_its_name(params, batch):
  settings = replace(SETTINGS, quantizer=f"{__name__}:Zeros")
  values = latents(params, batch, settings).values
  result = call(settings, "quantize", params, values)
  assert len(np.unique(np.asarray(result.codes).reshape(-1, LEVELS), axis=0)) == 1
  assert_array_equal(result.residuals[:, 0], values)


def test_the_gradient_of_finite_codes_is_that_of_the_bounded_latents(params, batch, run):
  settings = replace(SETTINGS, quantizer="fsq")
  own = {name: value for name, value in params.items() if name != "codebooks"}
  _, output, gradient = run(own, batch, settings=settings)
  assert output.terms["quantization"] == 0
  assert moved(gradient) == set(own)
  bounded = np.tanh(latents(own, batch, settings).values)
  assert_allclose(output.residuals[:, 0], bounded, atol=1e-6)
  _, output, _ = run(own, batch, settings=settings, quantized=False)
  assert_allclose(output.quantized["text"], bounded[0], atol=1e-6)
