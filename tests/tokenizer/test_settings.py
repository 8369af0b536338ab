"""Every field of a config's tokenizer reaches what it is for: its settings, step and plan, and the first codebooks."""

import dataclasses
import operator
import types

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.config import default_config
from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.feature_store import FeatureStore
from bbqrec_jax.data.interactions import from_lengths, leave_one_out
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.layers.apply import apply
from bbqrec_jax.ops.kmeans import residual_kmeans
from bbqrec_jax.tokenizer import train as tokenizer_stage
from bbqrec_jax.tokenizer.club import make_disentangling
from bbqrec_jax.tokenizer.model import Tokenizer
from bbqrec_jax.tokenizer.quantizers import Quantizer, make_quantizer
from bbqrec_jax.tokenizer.settings import ClubSettings, LossWeights, TokenizerSettings
from bbqrec_jax.tokenizer.train import run_tokenizer, tokenizer_settings, tokenizer_training
from bbqrec_jax.training.partitioning import SingleDevice
from bbqrec_jax.training.settings import Safeguards
from bbqrec_jax.utils.settings import to_config

ITEMS, USERS = 40, 30
SMALL = {
  "seed": 3, "tokenizer.code_width": 4, "tokenizer.num_levels": 2, "tokenizer.num_codes": 5, "tokenizer.hidden": (6,),
  "tokenizer.max_length": 6, "tokenizer.row_length": 8, "tokenizer.batch_rows": 2, "tokenizer.batch_items": 8,
  "tokenizer.steps": 20, "tokenizer.warmup_steps": 8, "tokenizer.kmeans_iterations": 3,
}  # fmt: skip


def make_config(**changes):
  config = default_config()
  config.update_from_flattened_dict(SMALL | changes)
  return config


@pytest.fixture(scope="module")
def dataset():
  """Two modalities, of which some items lack one."""
  rng = np.random.default_rng(0)
  lengths = rng.integers(3, 9, USERS)
  interactions = from_lengths(rng.integers(ITEMS, size=lengths.sum()), lengths, np.arange(USERS).astype(str))
  features = {name: rng.normal(size=(ITEMS, width)).astype(np.float32) for name, width in (("text", 7), ("image", 5))}
  present = {"text": np.arange(ITEMS) % 5 != 2, "image": np.ones(ITEMS, bool)}
  return Dataset("of a test", "", interactions, features, present, ItemIds.numbered(ITEMS), ("",) * ITEMS)


def test_the_settings_are_those_of_the_config_and_the_shapes_those_of_the_data(dataset):
  config = make_config(**{"tokenizer.weights.contrast": 0.75, "tokenizer.repair": "suffix", "tokenizer.dropout": 0.375})
  settings = tokenizer_settings(config, dataset)
  assert to_config(settings) == config.tokenizer
  assert settings.modalities == (("text", 7), ("image", 5))
  assert settings.num_items == ITEMS


def test_where_nothing_is_learned_there_are_no_item_ids_and_codebooks_of_their_own(dataset):
  settings = tokenizer_settings(make_config(**{"tokenizer.quantizer": "rq_kmeans"}), dataset)
  assert settings.streams == ("text", "image", "fused")
  assert settings.codebook_shape[0] == 3


def test_features_stay_on_the_device_as_long_as_they_are_not_too_large(dataset):
  store = FeatureStore(
    dataset.features | {"text": np.zeros((ITEMS, 2**20 // (4 * ITEMS)), np.float32)}, dataset.present
  )
  assert 2**20 < store.nbytes < 2 * 2**20
  for mebibytes, held in ((0, False), (1, False), (2, True)):
    config = make_config(**{"tokenizer.device_features": mebibytes})
    made = tokenizer_training(
      tokenizer_settings(config, dataset), leave_one_out(dataset.interactions).train, store, seed=0
    )
    assert (made.shared() is not None) == held
    batch = next(iter(made.batches))
    assert ("features" in batch) != held


def test_the_bound_is_as_the_settings_say_and_left_out_where_its_weight_is_0():
  settings = TokenizerSettings((("text", 3),), num_items=5, club=ClubSettings(steps=7))
  assert make_disentangling(settings).steps == 7
  assert make_disentangling(dataclasses.replace(settings, weights=LossWeights(disentangle=0.0))) is None


class Enough(Exception):
  """What the stage below comes to instead of training."""


@pytest.fixture
def prepare(dataset, monkeypatch, tmp_path):
  """A function (config, partitioner) -> plan and first state that `run_tokenizer` would train by."""

  def run(config, partitioner):
    def fit(plan, state, *arguments, **options):
      raise Enough(plan, state)

    monkeypatch.setattr(tokenizer_stage, "fit", fit)
    split = leave_one_out(dataset.interactions)
    with pytest.raises(Enough) as stopped:
      run_tokenizer(config, dataset, split, data_hash="of a test", workdir=tmp_path, partitioner=partitioner, log=None)
    return stopped.value.args

  return run


def test_training_is_planned_and_guarded_as_the_config_says(prepare):
  config = make_config(**{
    "log_every": 7, "keep_checkpoints": 5, "on_nonfinite": "skip", "max_skipped": 4, "spike_factor": 9.0,
    "tokenizer.evaluate_every": 11,
  })  # fmt: skip
  anywhere = types.SimpleNamespace(
    compile_map=lambda function: function,
    compile_step=lambda function: function,
    create=lambda function: None,
    place=lambda tree: tree,
  )
  plan, _ = prepare(config, anywhere)
  assert (plan.name, plan.steps, plan.log_every, plan.evaluate_every) == ("tokenizer", 20, 7, 11)
  assert plan.select is None
  assert plan.safeguards == Safeguards(keep_checkpoints=5, on_nonfinite="skip", max_skipped=4, spike_factor=9.0)


def test_when_the_warm_up_ends_the_codebooks_are_fitted_to_the_latents_once(prepare, dataset, monkeypatch):
  config = make_config()
  settings = tokenizer_settings(config, dataset)
  codebooks = np.random.default_rng(5).normal(size=settings.codebook_shape).astype(np.float32)
  calls = []

  def fit(quantizer, *arguments, **options):
    calls.append((quantizer.settings, *arguments, options))
    return codebooks

  monkeypatch.setattr(Quantizer, "fit", fit)
  plan, state = prepare(config, SingleDevice())
  assert list(plan.before) == [8]
  assert not calls
  # Not as they were made: codes have been in use.
  used = state.replace(usage=state.usage + 0.5)
  fitted = plan.before[8](used)
  ((of_settings, latents, present, options),) = calls
  assert of_settings == settings
  assert options == {"seed": 3}
  rows = FeatureStore(dataset.features, dataset.present).rows(np.arange(ITEMS))
  encode = jax.jit(lambda params: apply(Tokenizer(settings), params, "latents", np.arange(ITEMS), *rows))
  expected = encode(state.params)
  assert_allclose(latents, expected.values, atol=1e-5)
  assert_array_equal(present, expected.present)

  assert_array_equal(fitted.params["codebooks"], codebooks)
  assert_array_equal(fitted.usage, np.full((1, 2, 5), 0.2, np.float32))
  kept = fitted.replace(params=fitted.params | {"codebooks": state.params["codebooks"]}, usage=used.usage)
  assert all(map(operator.is_, *map(jax.tree.leaves, (kept, used)))), "the rest is left as it is"


ROWS, WIDTH = 30, 3
CODEBOOKS = TokenizerSettings(
  (("text", 5), ("image", 4)), num_items=ROWS, code_width=WIDTH, num_levels=2, num_codes=5, hidden=(4,), item_id="none"
)


@pytest.fixture(scope="module")
def rows():
  """Latents [3, 30, 3] of three streams in different places, and which of them are present."""
  rng = np.random.default_rng(7)
  latents = rng.normal(size=(3, ROWS, WIDTH)) + np.array([[[0, 0, 0]], [[4, 0, 0]], [[0, -4, 0]]])
  present = np.stack([rng.random(ROWS) < 0.6, rng.random(ROWS) < 0.5, np.ones(ROWS, bool)])
  return latents.astype(np.float32), present


def fitted(codebooks, latents, present, **changes):
  options = {"kmeans_iterations": 4, "seed": 1} | changes
  seed = options.pop("seed")
  settings = dataclasses.replace(CODEBOOKS, codebooks=codebooks, **options)
  return make_quantizer(settings).fit(latents, present, seed=seed)


@pytest.mark.parametrize("codebooks", ["shared", "per_stream"])
def test_codebooks_are_the_residual_kmeans_of_the_latents_that_they_serve_and_are_present(rows, codebooks):
  latents, present = rows

  def kmeans(points, weights):
    return residual_kmeans(
      1, points.reshape(-1, WIDTH), num_levels=2, num_codes=5, weights=weights.reshape(-1), iterations=4
    )

  if codebooks == "per_stream":
    expected = np.stack([kmeans(latents[stream], present[stream]) for stream in range(3)])
  else:
    expected = kmeans(latents, present)[None]
  got = fitted(codebooks, latents, present)
  assert got.shape == dataclasses.replace(CODEBOOKS, codebooks=codebooks).codebook_shape
  assert_allclose(got, expected, rtol=1e-6)
  garbage = np.where(present[..., None], latents, np.float32("nan"))
  assert_array_equal(fitted(codebooks, garbage, present), got)


def test_how_codebooks_are_fitted_is_told(rows):
  latents, present = rows
  plain = fitted("shared", latents, present)
  for changes in ({"kmeans_iterations": 1}, {"seed": 2}):
    assert (fitted("shared", latents, present, **changes) != plain).any(), changes
