"""Two towers are two recommenders: their losses, gradients and scores are those of each by itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.recommender.catalogue import Catalogue, code_columns
from bbqrec_jax.recommender.model import Recommender
from bbqrec_jax.recommender.settings import DenseTowerSettings, RecommenderSettings
from bbqrec_jax.recommender.two_towers import TwoTowers, make_recommender, tower_settings
from bbqrec_jax.semantic_ids.trie import build_trie

ITEMS, LEVELS, CODES, FEATURES = 14, 3, 4, 5
SETTINGS = RecommenderSettings(
  norm="pre",
  num_items=ITEMS, num_levels=LEVELS, num_codes=CODES, num_columns=LEVELS, feature_width=FEATURES, head="hybrid",
  width=8, num_layers=1, num_heads=2, mlp_width=12, depth_layers=1, dropout=0.4, max_length=6, num_streams=1,
  table_buckets=4, item_inputs=("fused", "features", "item"),
  dense_tower=DenseTowerSettings(width=6, mlp_width=10, dropout=0.0),
)  # fmt: skip
ROWS = 3


@pytest.fixture(scope="module")
def catalogue():
  rng = np.random.default_rng(0)
  ids = np.stack(np.unravel_index(rng.choice(CODES**LEVELS, ITEMS, replace=False), (CODES,) * LEVELS), axis=1)
  return Catalogue(
    semantic_ids=jnp.asarray(ids, jnp.int32),
    columns=jnp.asarray(code_columns([ids], [np.ones(ITEMS, bool)], num_codes=CODES)),
    streams=jnp.asarray(rng.normal(size=(ITEMS, 1, 5)), jnp.float32),
    edges=jnp.asarray(np.sort(rng.uniform(-0.6, 0.6, size=(1, 3)), axis=1), jnp.float32),
    features=jnp.asarray(rng.normal(size=(ITEMS, FEATURES)), jnp.float32),
    trie=build_trie(ids),
  )


@pytest.fixture(scope="module")
def batch():
  items, targets = np.random.default_rng(1).integers(ITEMS, size=(2, ROWS, 6))
  segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
  positions = np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [0, 1, 0, 0, 0, 0]])
  return {"items": items, "targets": targets, "segments": segments, "positions": positions}


@pytest.fixture(scope="module")
def queries(batch):
  """A history a row."""
  return batch | {"segments": np.minimum(batch["segments"], batch["segments"] == 1)}


@pytest.fixture(scope="module")
def params(random_params, catalogue, batch):
  return random_params(make_recommender(SETTINGS), catalogue, batch)


@functools.partial(jax.jit, static_argnames=("model", "method", "width", "deterministic"))
def call(model, method, params, *args, **more):
  return model.apply({"params": params}, *args, method=method, **more)


def towers(settings=SETTINGS):
  return zip(("generative", "dense"), map(Recommender, tower_settings(settings)), strict=True)


def test_the_hybrid_is_two_towers_and_nothing_else_is():
  assert isinstance(make_recommender(SETTINGS), TwoTowers)
  assert type(make_recommender(dataclasses.replace(SETTINGS, head="dense"))) is Recommender


def test_the_towers_share_nothing_and_the_dense_one_has_no_semantics(params):
  assert set(params) == {"generative", "dense"}
  assert {"similarity_tables", "code_embedding", "item_embedding", "feature_map", "head"} < set(params["generative"])
  assert set(params["dense"]) == {"item_embedding", "feature_map", "backbone", "head"}
  assert params["generative"]["item_embedding"].shape == (ITEMS, 8)
  assert params["dense"]["item_embedding"].shape == (ITEMS, 6)
  kernels = {leaf.shape for leaf in jax.tree.leaves(params["dense"]["backbone"]) if leaf.ndim == 2}
  assert (6, 10) in kernels


def test_settings_of_the_dense_tower():
  generative, dense = tower_settings(dataclasses.replace(SETTINGS, item_dropout=0.3))
  assert (generative.dropout, dense.dropout) == (0.4, 0.0)
  assert generative.item_dropout == dense.item_dropout == 0.3
  _, plain = tower_settings(dataclasses.replace(SETTINGS, item_dropout=0.3, feature_width=0))
  assert plain.item_dropout == 0.0, "an item of which nothing but its number is known must keep that"


def test_loss_and_gradient_are_those_of_each_tower_by_itself(params, catalogue, batch):
  def of(model, own):
    def loss(own):
      return model.apply({"params": own}, catalogue, batch, method="loss", deterministic=True)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(own)

  (value, terms), gradient = of(make_recommender(SETTINGS), params)
  summed, every = 0.0, {}
  for name, tower in towers():
    (own_value, own_terms), own_gradient = of(tower, params[name])
    jax.tree.map(functools.partial(assert_allclose, rtol=1e-4, atol=1e-6), gradient[name], own_gradient)
    summed, every = summed + own_value, every | own_terms
  assert_allclose(value, summed, rtol=1e-6)
  assert set(terms) == {"nll", "nll_dense", *(f"nll_level_{level + 1}" for level in range(LEVELS))}
  assert_allclose([terms[name] for name in terms], [(every | {"nll": value})[name] for name in terms], rtol=1e-6)


def test_dropout_reaches_both_towers(params, catalogue, batch):
  model = make_recommender(
    dataclasses.replace(SETTINGS, dense_tower=dataclasses.replace(SETTINGS.dense_tower, dropout=0.4))
  )
  first, second = (
    call(model, "loss", params, catalogue, batch, deterministic=False, rngs={"dropout": jax.random.key(seed)})[1]
    for seed in (0, 1)
  )
  assert all(first[name] != second[name] for name in first)


def both(params, catalogue, queries, settings=SETTINGS):
  """Log-probabilities of all items [B, N], of each tower."""
  seen = make_recommender(settings).seen(queries)
  every = jnp.tile(jnp.arange(catalogue.num_items), (ROWS, 1))
  found = {}
  for name, tower in towers(settings):
    states = call(tower, "last_states", params[name], catalogue, queries)
    found[name] = np.asarray(call(tower, "log_probs", params[name], catalogue, states, every, seen), np.float64)
  return found["generative"], found["dense"]


def test_log_probs_are_the_sum_of_both_towers(params, catalogue, queries):
  model = make_recommender(SETTINGS)
  states = call(model, "last_states", params, catalogue, queries)
  every = jnp.tile(jnp.arange(ITEMS), (ROWS, 1))
  found = call(model, "log_probs", params, catalogue, states, every, model.seen(queries))
  assert_allclose(found, sum(both(params, catalogue, queries)), atol=1e-4)


def expected_order(generative, dense, *, width, exclude):
  """For one user: all that is allowed, by both towers, and the log-probabilities among one another."""
  among = np.setdiff1d(np.arange(len(dense)), exclude)
  scores = dense[among] + generative[among]
  order = np.argsort(-scores)[:width]
  return among[order], scores[order] - np.log(np.exp(scores).sum())


@pytest.mark.parametrize("width", [ITEMS, ITEMS + 3])
def test_a_search_as_wide_as_the_catalogue_is_the_exact_ranking(params, catalogue, queries, width):
  model = make_recommender(SETTINGS)
  exclude = np.array([[0, 5], [-1, -1], [3, -1]])
  states = call(model, "last_states", params, catalogue, queries)
  seen = model.seen(queries)
  found = call(model, "search", params, catalogue, states, width=width, exclude=jnp.asarray(exclude), seen=seen)
  for row, (generative, dense) in enumerate(zip(*both(params, catalogue, queries), strict=True)):
    items, log_probs = expected_order(generative, dense, width=width, exclude=exclude[row])
    assert len(items) == ITEMS - np.count_nonzero(exclude[row] >= 0)
    assert_array_equal(found.items[row], np.pad(items, (0, width - len(items)), constant_values=-1))
    assert_allclose(found.log_probs[row, : len(items)], log_probs, atol=1e-4)
    assert np.isneginf(found.log_probs[row, len(items) :]).all()


def test_a_narrow_search_ranks_the_candidates_of_both_towers(params, catalogue, queries):
  width = 6
  model = make_recommender(SETTINGS)
  states, seen = call(model, "last_states", params, catalogue, queries), model.seen(queries)
  found = call(model, "search", params, catalogue, states, width=width, seen=seen)
  beam = call(
    Recommender(tower_settings(SETTINGS)[0]), "search", params["generative"], catalogue, states[0], width=2, seen=seen,
  )  # fmt: skip
  generative, dense = both(params, catalogue, queries)
  only_generated = 0
  for row in range(ROWS):
    best = np.argsort(-dense[row])[:width]
    among = np.union1d(best, beam.items[row])
    scores = dense[row, among] + generative[row, among]
    order = np.argsort(-scores)[:width]
    assert_array_equal(found.items[row], among[order])
    assert_allclose(found.log_probs[row], scores[order] - np.log(np.exp(scores).sum()), atol=1e-4)
    only_generated += len(among) - width
  assert only_generated > 0, "the towers must differ for this to test anything"


def test_nothing_is_found_where_all_is_excluded(params, catalogue, queries):
  model = make_recommender(SETTINGS)
  states, seen = call(model, "last_states", params, catalogue, queries), model.seen(queries)
  exclude = jnp.tile(jnp.arange(ITEMS), (ROWS, 1))
  found = call(model, "search", params, catalogue, states, width=4, exclude=exclude, seen=seen)
  assert_array_equal(found.items, np.full((ROWS, 4), -1))
  assert np.isneginf(found.log_probs).all()


def test_items_that_came_after_training_are_candidates(random_params, catalogue, batch, queries):
  known = ITEMS - 3
  settings = dataclasses.replace(SETTINGS, num_items=known)
  model = make_recommender(settings)
  own = random_params(model, catalogue, batch)
  assert own["dense"]["item_embedding"].shape == (known, 6)
  states, seen = call(model, "last_states", own, catalogue, queries), model.seen(queries)
  found = call(model, "search", own, catalogue, states, width=ITEMS, seen=seen)
  for row, (generative, dense) in enumerate(zip(*both(own, catalogue, queries, settings), strict=True)):
    items, log_probs = expected_order(generative, dense, width=ITEMS, exclude=[])
    assert_array_equal(found.items[row], items)
    assert_allclose(found.log_probs[row], log_probs, atol=1e-4)
