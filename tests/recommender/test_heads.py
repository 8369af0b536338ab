"""The generative head's cached steps against teacher forcing, for every prefix; the dense head's cosines by NumPy."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.recommender.generative import GenerativeHead
from bbqrec_jax.recommender.heads import DenseHead
from bbqrec_jax.recommender.parts import Items
from bbqrec_jax.recommender.settings import RecommenderSettings

BATCH, LEVELS, CODES, WIDTH = 2, 3, 3, 8
EVERY_ID = np.array(list(itertools.product(range(CODES), repeat=LEVELS)))
MODEL = GenerativeHead(
  RecommenderSettings(
    norm="pre",
    num_levels=LEVELS, num_codes=CODES, width=WIDTH, depth_layers=2, num_heads=2, mlp_width=12, dropout=0.3,
    subtree_logits=False, seen_item_bias=False,
  )
)  # fmt: skip


@pytest.fixture(scope="module")
def params(random_params):
  return random_params(MODEL, jnp.zeros((1, WIDTH)), jnp.zeros((1, LEVELS), int))


@pytest.fixture(scope="module")
def states():
  return jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, WIDTH)), jnp.float32)


@jax.jit
def forced(params, states, codes):
  return jnp.stack(MODEL.apply({"params": params}, states, codes)[0], axis=1)


@jax.jit
def stepped(params, states, codes):
  """Log-probabilities [L, B, w, K] by `step`, codes [B, w, L] being chosen whatever their probability."""

  def walk(model):
    state = jax.tree.map(lambda leaf: jnp.repeat(leaf, codes.shape[1], axis=1), model.start(states))
    result = []
    for level in range(LEVELS):
      log_probs, state = model.step(state, level, codes[..., level - 1] if level else None)
      result.append(log_probs)
    return jnp.stack(result)

  return MODEL.apply({"params": params}, method=walk)


def test_cached_steps_equal_teacher_forcing_for_every_prefix(params, states):
  count = len(EVERY_ID)
  logits = forced(params, jnp.repeat(states, count, axis=0), jnp.tile(EVERY_ID, (BATCH, 1)))
  assert logits.shape == (BATCH * count, LEVELS, CODES)
  expected = np.asarray(jax.nn.log_softmax(logits)).reshape(BATCH, count, LEVELS, CODES)
  got = stepped(params, states, jnp.tile(EVERY_ID, (BATCH, 1, 1)))
  assert_allclose(got, expected.transpose(2, 0, 1, 3), atol=1e-5)


def test_dropout_draws_by_its_key_and_reaches_the_logits_of_every_level(params, states):
  codes = jnp.zeros((BATCH, LEVELS), int)

  @jax.jit
  def dropped(params, key):
    return jnp.stack(MODEL.apply({"params": params}, states, codes, deterministic=False, rngs={"dropout": key})[0])

  one, again, two = (np.asarray(dropped(params, jax.random.key(seed))) for seed in (0, 0, 1))
  assert_array_equal(one, again)
  assert (one != two).any(axis=(1, 2)).all()


def test_the_probabilities_of_all_ids_sum_to_one(params, states):
  log_probs = np.asarray(stepped(params, states, jnp.tile(EVERY_ID, (BATCH, 1, 1))), np.float64)
  own = sum(log_probs[level][:, np.arange(len(EVERY_ID)), EVERY_ID[:, level]] for level in range(LEVELS))
  assert_allclose(np.exp(own).sum(axis=1), np.ones(BATCH), rtol=1e-5)


@pytest.mark.parametrize("level", range(LEVELS))
def test_logits_of_a_level_depend_on_every_code_before_it_and_on_none_after(params, states, level):
  codes = np.zeros((BATCH, LEVELS), int)
  other = codes.copy()
  other[:, level] = 1
  before, after = (np.asarray(forced(params, states, jnp.asarray(x))) for x in (codes, other))
  assert_array_equal(after[:, : level + 1], before[:, : level + 1])
  assert (after[:, level + 1 :] != before[:, level + 1 :]).any(axis=-1).all()


def test_every_level_depends_on_the_state_of_its_own_row_alone(params, states):
  codes = jnp.zeros((BATCH, LEVELS), int)
  before = np.asarray(forced(params, states, codes))
  after = np.asarray(forced(params, states.at[1].multiply(-1.0), codes))
  assert_array_equal(after[0], before[0])
  assert (after[1] != before[1]).any(axis=-1).all()


DENSE = RecommenderSettings(head="dense", width=WIDTH, seen_item_bias=False)
VECTORS = np.random.default_rng(1).normal(size=(6, WIDTH)).astype(np.float32)
VECTORS[4] = 0.0  # Of an item that nothing is known of.
TARGETS = np.array([2, 4])


def dense(settings, method, log_scale, states, vectors=VECTORS, **options):
  """A method of the dense head on items of given vectors."""
  vectors = jnp.asarray(vectors)
  items = Items(None, lambda some=None: vectors if some is None else vectors[some])
  params = {"log_scale": jnp.float32(log_scale)} if settings.cosine else {}
  return DenseHead(settings).apply({"params": params}, items, states, method=method, **options)


@jax.jit
def loss(log_scale, states, vectors=VECTORS):
  weights = jnp.array([1.0, 2.0])
  options = {"targets": TARGETS, "weights": weights, "deterministic": True}
  return dense(DENSE, "summed_losses", log_scale, states, vectors, **options)["nll_dense"]


def test_the_dense_head_scores_by_cosines_times_a_learned_scale(states):
  lengths = np.linalg.norm(states, axis=1)[:, None] * np.maximum(np.linalg.norm(VECTORS, axis=1), 1e-9)
  cosines = states @ VECTORS.T / lengths
  got = dense(DENSE, "scores", np.log(3.0), states)
  assert_allclose(got, 3.0 * cosines, rtol=1e-5, atol=1e-6)
  assert_array_equal(got[:, 4], 0.0)
  expected = jax.nn.logsumexp(got, axis=1) - got[np.arange(2), TARGETS]
  assert_allclose(loss(np.log(3.0), states), expected @ jnp.array([1.0, 2.0]), rtol=1e-5)
  init = DenseHead(DENSE).lazy_init(jax.random.key(0), Items(None, lambda some=None: VECTORS), states, method="scores")
  assert_allclose(np.exp(init["params"]["log_scale"]), 1 / 0.07, rtol=1e-5)


def test_no_length_of_a_vector_changes_a_cosine(states):
  longer = VECTORS * np.array([[3.0], [0.5], [10.0], [0.01], [1.0], [7.0]], np.float32)
  assert_allclose(loss(2.0, 5.0 * states, longer), loss(2.0, states), rtol=1e-4)


def test_the_scale_and_the_vectors_learn_and_what_is_zero_stays_finite(states):
  of_scale, of_vectors = jax.jit(jax.grad(loss, argnums=(0, 2)))(2.0, states, VECTORS)
  numeric = (loss(2.01, states) - loss(1.99, states)) / 0.02
  assert_allclose(of_scale, numeric, rtol=1e-2)
  assert np.isfinite(of_vectors).all()
  assert np.all(np.any(of_vectors != 0, axis=1) == np.any(VECTORS != 0, axis=1))


def test_without_cosines_the_dense_head_scores_by_products(states):
  plain = dataclasses.replace(DENSE, cosine=False)
  assert_allclose(dense(plain, "scores", None, states), states @ VECTORS.T, rtol=1e-5, atol=1e-5)
