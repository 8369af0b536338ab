"""Whatever types a process has by default, arrays have those that are stated: 64-bit mode changes none of them."""

import contextlib
import functools

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.config import default_config
from bbqrec_jax.data.interactions import leave_one_out
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.data.ranking import evaluation_batches
from bbqrec_jax.data.sources import load
from bbqrec_jax.layers.apply import apply
from bbqrec_jax.ops.kmeans import residual_kmeans
from bbqrec_jax.ops.randomness import base_key
from bbqrec_jax.recommender.evaluate import make_ranker, summarize
from bbqrec_jax.recommender.items import item_features
from bbqrec_jax.recommender.schedule import training_batches
from bbqrec_jax.recommender.step import make_recommender_step
from bbqrec_jax.recommender.train import build_recommender, initial_state
from bbqrec_jax.runs import run as experiment
from bbqrec_jax.runs.restore import restore
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.serving.bundle import Bundle, Query
from bbqrec_jax.serving.export import write_bundle
from bbqrec_jax.serving.recommend import recommend
from bbqrec_jax.tokenizer.losses import tokenizer_loss
from bbqrec_jax.tokenizer.train import tokenizer_settings, tokenizer_training
from bbqrec_jax.training.optimizer import make_optimizer

NUM_ITEMS, LEVELS, CODES = 40, 2, 8
SMALL = {
  "log_every": 2, "data.source": "synthetic", "data.synthetic.num_users": 60, "data.synthetic.num_items": NUM_ITEMS,
  "tokenizer.num_codes": CODES, "tokenizer.num_levels": LEVELS, "tokenizer.code_width": 8, "tokenizer.hidden": (8,),
  "tokenizer.steps": 4, "tokenizer.warmup_steps": 2, "tokenizer.batch_items": 16, "tokenizer.batch_rows": 4,
  "tokenizer.max_length": 8, "tokenizer.row_length": 8, "tokenizer.kmeans_iterations": 2,
  "recommender.width": 8, "recommender.mlp_width": 8, "recommender.num_layers": 1, "recommender.depth_layers": 1,
  "recommender.max_length": 8, "recommender.row_length": 8, "recommender.batch_rows": 8, "recommender.steps": 4,
  "recommender.evaluate_every": 2, "recommender.num_buckets": 4, "recommender.head_width": 4,
  "evaluation.batch_size": 32, "evaluation.beam_width": 20,
}  # fmt: skip
TOKENIZERS = {
  "as it comes": {},
  "otherwise": {
    "tokenizer.codebooks": "per_stream", "tokenizer.item_id": "none", "tokenizer.device_features": 0,
  },
}  # fmt: skip
SYSTEMS = {
  "parallel": {"recommender.head": "parallel", "recommender.similarity_kind": "continuous"},
  "generative": {"recommender.similarity_kind": "overlap"},
  "two towers": {
    "recommender.head": "hybrid", "recommender.item_inputs": ("fused", "modalities", "features", "item"),
    "recommender.item_dropout": 0.2, "recommender.dense_tower.width": 8,
    "recommender.candidate_similarity.streams": ("features", "modalities", "fused", "behaviour"),
  },
  "drawn": {
    "recommender.head": "dense", "recommender.item_inputs": ("features", "item"), "recommender.similarity": (),
    "recommender.item_dropout": 0.2, "recommender.num_negatives": 8, "recommender.time_buckets": 8,
    "recommender.rows": "packed",
    "recommender.accumulation": 2,
  },
  "encoder_decoder": {
    "recommender.backbone": "encoder_decoder", "recommender.item_inputs": ("fused",),
    "recommender.similarity": ("fused",),
  },
}  # fmt: skip


def make_config(changes):
  config = default_config()
  config.update_from_flattened_dict(SMALL | changes)
  return config


@functools.cache
def data():
  dataset = load(make_config({}).data)
  return dataset, leave_one_out(dataset.interactions)


def random_ids():
  rng = np.random.default_rng(0)
  own = np.stack(np.unravel_index(rng.permutation(CODES**LEVELS)[:NUM_ITEMS], (CODES,) * LEVELS), axis=1)
  dataset, _ = data()
  return SemanticIds(
    streams=(*dataset.present, "fused"),
    codes=own.astype(np.int32),
    stream_codes=rng.integers(CODES, size=(3, NUM_ITEMS, LEVELS)).astype(np.int32),
    present=np.stack([*dataset.present.values(), np.ones(NUM_ITEMS, bool)]),
    codebooks=rng.normal(size=(1, LEVELS, CODES, 4)).astype(np.float32),
    data_hash="of a test",
    item_ids=ItemIds.numbered(NUM_ITEMS),
  )


def tokenizer_problem(changes):
  """(what trains a tokenizer, its first batch)."""
  config, (dataset, split) = make_config(changes), data()
  training = tokenizer_training(tokenizer_settings(config, dataset), split.train, dataset.store, seed=0)
  batches = iter(training.batches)
  batch = next(batches)
  batches.close()
  return training, batch


def recommender_problem(changes):
  """(config, model, catalogue, first batch, what is ranked)."""
  config, (dataset, split) = make_config(changes), data()
  features = item_features(config, dataset.store)
  model, catalogue = build_recommender(config, random_ids(), split.train, num_items=NUM_ITEMS, features=features)
  batches = iter(training_batches(config, split.train))
  batch = next(batches)
  batches.close()
  ranked = next(evaluation_batches(split.history("test"), split.test_target, batch_size=8, max_length=8))
  return config, model, catalogue, batch, ranked


def types(tree):
  return jax.tree.map(lambda leaf: f"{leaf.dtype} {leaf.shape}", tree)


def traced(function, *args):
  """The types of what a function makes; no array on the way to it may be one that no 32-bit run has."""
  jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
  assert not list(wide(jaxpr.jaxpr))
  return types(shapes)


def wide(jaxpr):
  """64-bit floats and random bits; a scalar may be one (of the optimiser's schedule), and so may an index."""
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      if variable.aval.ndim and str(variable.aval.dtype) in ("float64", "uint64"):
        yield f"{variable.aval} of {equation}"[:200]
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda node: hasattr(node, "eqns")):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from wide(inner)


def dtypes(types_of_leaves):
  return {name.split()[0] for name in jax.tree.leaves(types_of_leaves)}


@pytest.fixture
def wide_mode():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_has_the_stated_types_in_64_bit_mode(name, wide_mode):
  training, batch = tokenizer_problem(TOKENIZERS[name])
  state = traced(training.initial_state)
  assert dtypes(state) == {"float32", "int32", "key<fry>"}
  step = functools.partial(training.step, axis_name=None)
  following, metrics = traced(step, jax.eval_shape(training.initial_state), training.shared(), batch)
  assert following == state
  assert dtypes(metrics) == {"float32"}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_recommender_has_the_stated_types_in_64_bit_mode(name, wide_mode):
  config, model, catalogue, batch, ranked = recommender_problem(SYSTEMS[name])
  made = jax.eval_shape(lambda: initial_state(config, model, catalogue, total_steps=4))
  assert dtypes(types(made)) == {"float32", "int32", "key<fry>"}
  optimizer = make_optimizer(config.recommender.optimizer, total_steps=4)
  step = make_recommender_step(model, optimizer, accumulation=config.recommender.accumulation)
  following, metrics = traced(functools.partial(step, axis_name=None), made, catalogue, batch)
  assert following == types(made)
  assert dtypes(metrics) == {"float32"}
  assert dtypes(traced(make_ranker(model, beam_width=20), made.params, catalogue, ranked)) == {"int32"}


@pytest.mark.parametrize("name", SYSTEMS)
def test_losses_and_rankings_need_no_implicit_promotion(name):
  config, model, catalogue, batch, ranked = recommender_problem(SYSTEMS[name])
  params = jax.eval_shape(lambda: initial_state(config, model, catalogue, total_steps=4)).params

  def gradient(params, key):
    def loss(params):
      return apply(model, params, "loss", catalogue, batch, deterministic=False, rngs={"dropout": key})[0]

    return jax.grad(loss)(params)

  with jax.numpy_dtype_promotion("strict"):
    assert types(jax.eval_shape(gradient, params, base_key(0))) == types(params)
    jax.eval_shape(make_ranker(model, beam_width=20), params, catalogue, ranked)


def in_both_modes(make):
  """What `make` gives in 64-bit mode, and as a process comes."""
  with jax.enable_x64(True):
    wide = make()
  return wide, make()


def test_random_draws_are_the_same_in_64_bit_mode():
  def losses():
    training, batch = tokenizer_problem({"tokenizer.device_features": 0})
    params = random_like(jax.eval_shape(training.initial_state).params)
    draw = functools.partial(tokenizer_loss, training.model, key=base_key(1))
    of_tokenizer, _ = jax.jit(draw)(params, batch)
    config, model, catalogue, batch, _ = recommender_problem(SYSTEMS["drawn"])
    params = random_like(jax.eval_shape(lambda: initial_state(config, model, catalogue, total_steps=4)).params)
    draw = functools.partial(apply, model, rngs={"dropout": base_key(2)}, deterministic=False)
    of_recommender, _ = jax.jit(draw, static_argnums=1)(params, "loss", catalogue, batch)
    return np.asarray(of_tokenizer), np.asarray(of_recommender)

  for actual, expected in zip(*in_both_modes(losses), strict=True):
    assert actual.dtype == np.float32
    assert_allclose(actual, expected, rtol=1e-6)


def random_like(shapes):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(np.float32), shapes)


def test_kmeans_and_metrics_are_the_same_in_64_bit_mode():
  points = np.random.default_rng(0).normal(size=(50, 4))
  ranks = np.array([0, 3, 12, np.iinfo(np.int32).max], np.int32)
  (codebooks, figures), expected = in_both_modes(
    lambda: (residual_kmeans(1, points, num_levels=2, num_codes=4, iterations=1), summarize(ranks))
  )
  assert codebooks.dtype == np.float32
  assert_array_equal(codebooks, expected[0])
  assert figures == expected[1]


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_a_seed_gives_the_key_that_jax_makes_of_it(seed):
  for mode in (contextlib.nullcontext(), jax.enable_x64(True), jax.default_prng_impl("rbg")):
    with mode:
      key = base_key(seed)
    assert key.dtype == jax.random.key(0).dtype
    assert_array_equal(jax.random.key_data(key), jax.random.key_data(jax.random.key(seed)))


def test_a_run_in_64_bit_mode_is_read_and_served(tmp_path):
  changes = {
    "partitioner": "single", "tokenizer.quantizer": "rq_kmeans", "recommender.head": "dense",
    "recommender.similarity": (), "recommender.evaluate_every": 4,
  }  # fmt: skip
  with jax.enable_x64(True):
    experiment.run(make_config(changes), tmp_path / "run")
    run = restore(tmp_path / "run")
    asked = {"top": 5, "beam_width": 10}
    items, scores = recommend(run.model, run.params, run.catalogue, np.array([3, 5, 7]), **asked)
    write_bundle(tmp_path / "made", run, top=5, platforms=["cpu"], batch_sizes=[1], widths=[16])
    history = np.array([3, 5, 7])
    assert history.dtype == np.int64
    (served,) = Bundle(tmp_path / "made").answer([Query(history, history)])
  assert (items.dtype, scores.dtype) == (np.int32, np.float32)
  assert_array_equal(served.items, items)
  assert_allclose(served.scores, scores, rtol=1e-5)
  # Whoever has no such mode reads it too.
  assert restore(tmp_path / "run").ids.fingerprint == run.ids.fingerprint
