"""Stage 1 as a whole, small: every choice trains, and what it leaves behind is consistent."""

import dataclasses
import functools
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from bbqrec_jax.config import default_config, read_config
from bbqrec_jax.data.interactions import Split, leave_one_out
from bbqrec_jax.data.sources import load
from bbqrec_jax.ops.quantize import residual_quantize
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.tokenizer import train as tokenizer_stage
from bbqrec_jax.tokenizer.inference import InferenceTokenizer, settings_from_json
from bbqrec_jax.tokenizer.quantizers import ResidualQuantizer
from bbqrec_jax.tokenizer.settings import QUANTIZERS, TokenizerSettings
from bbqrec_jax.tokenizer.step import make_tokenizer_step
from bbqrec_jax.tokenizer.train import run_tokenizer, tokenizer_settings
from bbqrec_jax.training.logging import MetricsLog
from bbqrec_jax.training.partitioning import SingleDevice
from bbqrec_jax.utils.json_files import read_json
from bbqrec_jax.utils.settings import flatten

pytestmark = pytest.mark.usefixtures("compile_cache")

STEPS, ITEMS, LEVELS, CODES = 20, 60, 2, 16
SMALL = {
  "log_every": 5, "data.source": "synthetic", "data.synthetic.num_users": 60, "data.synthetic.num_items": ITEMS,
  "tokenizer.code_width": 8, "tokenizer.num_levels": LEVELS, "tokenizer.num_codes": CODES, "tokenizer.hidden": (16,),
  "tokenizer.max_length": 8, "tokenizer.row_length": 8, "tokenizer.steps": STEPS, "tokenizer.warmup_steps": 8,
  "tokenizer.kmeans_iterations": 3, "tokenizer.batch_items": 32, "tokenizer.batch_rows": 4,
  "tokenizer.evaluate_every": STEPS, "tokenizer.club.steps": 2, "tokenizer.optimizer.warmup_steps": 2,
}  # fmt: skip
# Few runs that together take every choice, and every switch both ways.
ALTERNATIVES = {
  "default": {},
  "fragmented": {
    "tokenizer.codebooks": "per_stream", "tokenizer.semantic_id": "concatenated",
    "tokenizer.weights.disentangle": 0.0, "tokenizer.weights.item_id": 0.0, "tokenizer.hold_out_last": False,
  },
  "features in, codes out": {
    "tokenizer.item_id": "none", "tokenizer.repair": "suffix",
    "tokenizer.level_dropout": 0.0, "tokenizer.specific_dropout": 0.0,
    "tokenizer.revival_threshold": 0.0, "tokenizer.dropout": 0.0, "tokenizer.weights.contrast": 0.0,
    "tokenizer.weights.modality_contrast": 0.0,
  },
  "features alone": {"tokenizer.quantizer": "rq_kmeans"},
  "features alone, concatenated": {
    "tokenizer.quantizer": "rq_kmeans", "tokenizer.semantic_id": "concatenated", "tokenizer.repair": "suffix",
  },
  "finite": {"tokenizer.quantizer": "fsq"},
  "quantizer of one's own": {"tokenizer.quantizer": f"{__name__}:Signs"},
}  # fmt: skip


class Signs(ResidualQuantizer):
  """A quantizer of one's own: each level's code is the sign pattern of four coordinates."""

  def encode(self, latents, codebooks):
    bits = (latents.reshape(len(latents), 2, 4) > 0) @ (2 ** np.arange(4))
    chosen = jnp.stack([codebooks[level][bits[:, level]] for level in range(2)])
    return residual_quantize(latents, codebooks)._replace(codes=bits, codewords=chosen, quantized=chosen.sum(axis=0))


def make_config(changes):
  config = default_config()
  config.update_from_flattened_dict(SMALL | changes)
  read_config(config)
  return config


@pytest.fixture(scope="module")
def data():
  """Three modalities, 8, 64 and 8,192 wide, of which two are missing for some items, and the split."""
  dataset = load(make_config({}).data)
  items = np.arange(dataset.num_items)
  image, text = dataset.features["image"], dataset.features["text"]
  wide = image @ np.random.default_rng(0).normal(size=(image.shape[1], 8192)).astype(np.float16)
  features = {"audio": text[:, :8], "image": wide.astype(np.float16), "text": text}
  present = {"audio": items % 7 != 3, "image": items % 5 != 2, "text": np.ones(len(items), bool)}
  dataset = dataclasses.replace(dataset, features=features, present=present)
  return dataset, leave_one_out(dataset.interactions)


def train(dataset, split, workdir, changes):
  workdir.mkdir(parents=True, exist_ok=True)
  log = MetricsLog(workdir)
  try:
    return run_tokenizer(
      make_config(changes), dataset, split, data_hash="of a test", workdir=workdir, partitioner=SingleDevice(), log=log
    )
  finally:
    log.close()


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory, compile_cache):
  """A function from an alternative's name to its semantic IDs and workdir; each is trained once."""

  @functools.cache
  def run(name):
    workdir = tmp_path_factory.mktemp("tokenizer")
    return train(*data, workdir, ALTERNATIVES[name]), workdir

  return run


def test_the_runs_below_take_every_choice_and_every_switch_both_ways():
  taken = [flatten(make_config(changes)) for changes in ALTERNATIVES.values()]
  choices = {field.name: field.metadata["rule"].choices for field in dataclasses.fields(TokenizerSettings)}
  choices["quantizer"] = (*QUANTIZERS, f"{__name__}:Signs")
  for name, values in choices.items():
    if values:
      assert {run[f"tokenizer.{name}"] for run in taken} == set(values), name
  for name, value in flatten(default_config()).items():
    if name.startswith("tokenizer.") and isinstance(value, bool):
      assert {run[name] for run in taken} == {True, False}, name


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_every_alternative_trains(data, trained, name):
  dataset, _ = data
  ids, workdir = trained(name)
  config = make_config(ALTERNATIVES[name])
  settings = tokenizer_settings(config, dataset)

  columns = LEVELS * (len(dataset.modalities) if config.tokenizer.semantic_id == "concatenated" else 1)
  columns += config.tokenizer.repair == "suffix"
  assert ids.codes.shape == (ITEMS, columns)
  assert len(np.unique(ids.codes, axis=0)) == ITEMS
  assert ids.stream_codes.shape == (len(settings.streams), ITEMS, LEVELS)
  assert ids.stream_codes.min() >= 0
  assert ids.stream_codes.max() < CODES
  assert SemanticIds.load(workdir / "tokenizer").fingerprint == ids.fingerprint

  health = read_json(workdir / "tokenizer" / "health.json")
  assert len(health["usage"]) == columns - (config.tokenizer.repair == "suffix")
  assert health["collision_rate_after"] == 0
  assert set(health["cohesion"]) == {"level1", "level2", "floor1", "floor2", "training1", "training2"}
  for part in ("reconstruction", "reconstruction_from_codes"):
    assert set(health[part]) == set(dataset.modalities)
    assert all(math.isfinite(value) and value > 0 for value in health[part].values())

  if config.tokenizer.quantizer == "rq_kmeans":
    own, fused = health["reconstruction"], health["reconstruction_from_codes"]
    # What a modality's own codes rebuild, what those of all together do, and what the mean does.
    assert all(own[name] < fused[name] < 1 for name in dataset.modalities)
    assert health["contrast_recall@10"] is None
    assert not (workdir / "checkpoints").exists()
    return
  assert (health["contrast_recall@10"] is not None) == bool(config.tokenizer.weights.contrast)
  assert 0 <= (health["contrast_recall@10"] or 0) <= 1
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
  records = [line for line in lines if line["kind"] == "train"]
  assert [record["step"] for record in records] == list(range(5, STEPS + 1, 5))
  assert records[-1]["reconstruction"] < records[0]["reconstruction"] - 0.05
  quantized = [record["step"] > 8 and name != "finite" for record in records]
  assert [record["quantization"] > 0 for record in records] == quantized
  assert (workdir / "checkpoints" / "tokenizer" / str(STEPS)).is_dir()


def test_every_alternative_gives_ids_of_its_own(trained):
  assert len({(ids.codes.tobytes(), ids.codebooks.tobytes()) for ids, _ in map(trained, ALTERNATIVES)}) == len(
    ALTERNATIVES
  )


@pytest.mark.parametrize("name", ["features in, codes out", "features alone"])
def test_the_artefact_alone_gives_every_item_of_no_id_vector_its_codes_again(data, trained, name):
  dataset, _ = data
  ids, _ = trained(name)
  frozen = InferenceTokenizer(settings_from_json(ids.settings), ids.encoder, ids.codebooks)
  store = dataset.store
  _, present, codes = frozen(*store.rows(np.arange(ITEMS)))
  np.testing.assert_array_equal(codes, ids.stream_codes)
  np.testing.assert_array_equal(present, ids.present)


def test_held_out_items_change_nothing_that_is_learned(data, trained, tmp_path):
  """Other validation and test items: the same codes, codewords and encoders, bit for bit."""
  dataset, split = data
  rng = np.random.default_rng(0)
  other = Split(**(vars(split) | {
    "validation_target": rng.integers(0, ITEMS, len(split.validation_target)).astype(split.validation_target.dtype),
    "test_target": rng.integers(0, ITEMS, len(split.test_target)).astype(split.test_target.dtype),
  }))  # fmt: skip
  assert (other.validation_target != split.validation_target).any()
  ids, workdir = trained("default")
  again = train(dataset, other, tmp_path, {})
  assert again.fingerprint == ids.fingerprint
  one, two = (read_json(folder / "tokenizer" / "health.json")["cohesion"] for folder in (workdir, tmp_path))
  assert one != two, "the figures about held-out items are of the held-out items"


def test_a_loss_that_breaks_is_named_with_its_stage_and_step(data, tmp_path):
  dataset, split = data
  name = dataset.modalities[0]
  broken = dataclasses.replace(
    dataset, features=dataset.features | {name: np.full_like(dataset.features[name], np.nan)}
  )
  with pytest.raises(FloatingPointError, match=r"^tokenizer: .*\breconstruction is nan.* at step 1, whose batch "):
    train(broken, split, tmp_path, {})
  assert not SemanticIds.exists(tmp_path / "tokenizer")


def test_the_step_is_compiled_once(data, trained, tmp_path, monkeypatch):
  """That k-means replaces the codebooks half-way must not change any type: compiling takes longer than the steps."""
  traces = []

  def counting(*args, **kwargs):
    step = make_tokenizer_step(*args, **kwargs)

    def counted(state, shared, batch, *, axis_name):
      traces.append(axis_name)
      return step(state, shared, batch, axis_name=axis_name)

    return counted

  monkeypatch.setattr(tokenizer_stage, "make_tokenizer_step", counting)
  assert train(*data, tmp_path, {}).fingerprint == trained("default")[0].fingerprint
  assert traces == [None]


def test_features_that_stay_on_the_device_are_those_that_the_host_reads(data, trained, tmp_path):
  read, held = train(*data, tmp_path, {"tokenizer.device_features": 0}), trained("default")[0]
  for name in ("codes", "stream_codes", "codebooks"):
    np.testing.assert_array_equal(getattr(read, name), getattr(held, name))
