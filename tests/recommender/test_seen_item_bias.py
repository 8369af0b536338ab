"""What the history has: a learned number is added to its items' scores, or to nodes as far as they lead on to them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.recommender.catalogue import Catalogue, code_columns
from bbqrec_jax.recommender.model import Recommender
from bbqrec_jax.recommender.settings import RecommenderSettings
from bbqrec_jax.recommender.subtree_logits import BIAS_UNIT
from bbqrec_jax.semantic_ids.trie import build_trie

ITEMS, LEVELS, CODES, WIDTH, LENGTH = 12, 3, 3, 8, 6
GENERATIVE = RecommenderSettings(
  norm="pre",
  num_items=ITEMS, num_levels=LEVELS, num_codes=CODES, num_columns=LEVELS, width=WIDTH, num_layers=1, num_heads=2,
  head_width=4, mlp_width=12, depth_layers=1, dropout=0.0, max_length=LENGTH, subtree_logits=False, seen_item_bias=True,
  cosine=False,
)  # fmt: skip
DENSE = dataclasses.replace(GENERATIVE, head="dense")
NODES = dataclasses.replace(GENERATIVE, subtree_logits=True)
T5 = dataclasses.replace(GENERATIVE, backbone="encoder_decoder", subtree_logits=True)
EACH = pytest.mark.parametrize(
  "settings", [GENERATIVE, DENSE, NODES, T5], ids=["generative", "dense", "nodes", "encoder_decoder"]
)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
POSITIONS = np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [0, 1, 0, 0, 0, 0]])
ROWS = np.minimum(SEGMENTS, SEGMENTS == 1)  # A history a row.


@pytest.fixture(scope="module")
def catalogue():
  rng = np.random.default_rng(0)
  ids = np.stack(np.unravel_index(rng.choice(CODES**LEVELS, ITEMS, replace=False), (CODES,) * LEVELS), axis=1)
  columns = code_columns([ids], [np.ones(ITEMS, bool)], num_codes=CODES)
  return Catalogue(
    semantic_ids=jnp.asarray(ids, jnp.int32), columns=jnp.asarray(columns), streams=jnp.zeros((ITEMS, 0, 1)),
    edges=jnp.zeros((0, 3)), trie=build_trie(ids),
  )  # fmt: skip


@pytest.fixture(scope="module")
def items():
  return np.random.default_rng(1).integers(ITEMS, size=SEGMENTS.shape)


def batch_of(settings, items):
  if settings.backbone == "encoder_decoder":
    targets = np.array([3, 7, int(items[2, 1])])
    return {"items": items, "targets": targets, "segments": ROWS, "positions": POSITIONS * ROWS}
  targets = np.roll(items, -1, axis=1)
  targets[:, 0] = items[:, 0]  # A target that the history has.
  return {"items": items, "targets": targets, "segments": SEGMENTS, "positions": POSITIONS}


def with_biases(params, value):
  """The parameters with the biases of all heads, which have the shape that they have, at what `value` gives."""

  def change(path, leaf):
    mine = str(path[-1].key).startswith("seen_item_bias")
    return np.broadcast_to(np.float32(value), leaf.shape).copy() if mine else leaf

  return jax.tree_util.tree_map_with_path(change, params)


@functools.partial(jax.jit, static_argnames=("settings", "method", "width", "deterministic"))
def call(settings, method, params, catalogue, *args, **options):
  return Recommender(settings).apply({"params": params}, catalogue, *args, method=method, **options)


def loss(settings, params, catalogue, batch):
  return call(settings, "loss", params, catalogue, batch, deterministic=True)[0]


def histories(items):
  """Of three users: rows, and what is behind each, as `seen` has it."""
  batch = {"items": items, "segments": ROWS, "positions": POSITIONS * ROWS}
  return batch, [set(row[real > 0].tolist()) for row, real in zip(items, ROWS, strict=True)]


def test_past_is_what_stands_before_and_at_each_position_of_its_own_history(items):
  packed = np.asarray(Recommender(DENSE).seen({"items": items, "segments": SEGMENTS}, packed=True))
  assert packed.shape == (SEGMENTS.size, LENGTH)
  for row in range(len(items)):
    for place in range(LENGTH):
      segment = SEGMENTS[row, place]
      expected = {int(items[row, t]) for t in range(place + 1) if SEGMENTS[row, t] == segment and segment}
      got = packed[row * LENGTH + place]
      assert sorted(got[got >= 0].tolist()) == sorted(expected), "each once"
  batch, expected = histories(items)
  rows = np.asarray(Recommender(T5).seen(batch))
  assert [sorted(row[row >= 0].tolist()) for row in rows] == [sorted(row) for row in expected]
  assert Recommender(dataclasses.replace(DENSE, seen_item_bias=False)).seen(batch) is None


@EACH
def test_biases_start_at_zero_and_then_change_nothing(random_params, settings, catalogue, items):
  batch = batch_of(settings, items)
  start = jax.jit(Recommender(settings).init)(jax.random.key(0), catalogue, batch)["params"]
  jax.tree.map(assert_array_equal, with_biases(start, 0.0), start)
  params = with_biases(random_params(Recommender(settings), catalogue, batch), 0.0)
  plain = dataclasses.replace(settings, seen_item_bias=False)
  needed = jax.eval_shape(Recommender(plain).init, jax.random.key(0), catalogue, batch)["params"]

  def kept(shape, tree):
    return {name: kept(shape[name], tree[name]) for name in shape} if isinstance(shape, dict) else tree

  without = kept(needed, params)
  assert jax.tree.structure(without) == jax.tree.structure(needed)
  assert_allclose(loss(settings, params, catalogue, batch), loss(plain, without, catalogue, batch), rtol=1e-6)
  other = loss(settings, with_biases(params, 0.3), catalogue, batch)
  assert abs(other - loss(plain, without, catalogue, batch)) > 0.01


def test_the_dense_head_adds_its_bias_to_the_items_of_the_history(random_params, catalogue, items):
  batch, value = batch_of(DENSE, items), -0.17
  params = with_biases(random_params(Recommender(DENSE), catalogue, batch), value)
  states = np.asarray(call(DENSE, "states", params, catalogue, batch), np.float64).reshape(-1, WIDTH)
  vectors = np.asarray(call(DENSE, "item_vectors", params, catalogue), np.float64)
  seen = np.asarray(Recommender(DENSE).seen(batch, packed=True))

  def oracle(by):
    logits = states @ vectors.T
    for row, own in enumerate(seen):
      logits[row, own[own >= 0]] += by
    total = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), batch["targets"].reshape(-1)]
    return total[SEGMENTS.reshape(-1) > 0].mean()

  by = BIAS_UNIT * value
  got, gradient = jax.value_and_grad(lambda params: loss(DENSE, params, catalogue, batch))(params)
  assert_allclose(got, oracle(by), rtol=1e-5)
  slope = BIAS_UNIT * (oracle(by + 1e-4) - oracle(by - 1e-4)) / 2e-4
  assert abs(slope) > 0.01
  assert_allclose(gradient["head"]["seen_item_bias"], slope, rtol=1e-3)

  rows, expected = histories(items)
  seen, queries = Recommender(DENSE).seen(rows), jnp.asarray(states[:3], jnp.float32)
  scores = np.asarray(call(DENSE, "scores", params, catalogue, queries, seen), np.float64)
  raised = np.array([[by if item in own else 0.0 for item in range(ITEMS)] for own in expected])
  assert_allclose(scores, states[:3] @ vectors.T + raised, atol=1e-4)
  found = call(DENSE, "search", params, catalogue, queries, width=ITEMS, seen=seen)
  assert_array_equal(found.items, np.argsort(-scores, axis=1))


@pytest.mark.parametrize("settings", [GENERATIVE, NODES, T5], ids=["generative", "nodes", "encoder_decoder"])
def test_the_generative_head_adds_its_biases_to_nodes_by_the_share_that_the_history_has_of_them(
  random_params, settings, catalogue, items
):
  batch = batch_of(settings, items)
  params = random_params(Recommender(settings), catalogue, batch)
  biases = np.array([0.11, -0.07, -0.2], np.float32)
  own = with_biases(params, biases)
  rows, expected = histories(items)
  states = call(settings, "last_states", own, catalogue, rows)
  every, seen = jnp.tile(jnp.arange(ITEMS), (3, 1)), Recommender(settings).seen(rows)
  log_probs = np.asarray(call(settings, "log_probs", own, catalogue, states, every, seen), np.float64)
  plain = np.asarray(call(settings, "log_probs", with_biases(params, 0.0), catalogue, states, every, seen), np.float64)
  assert_allclose(np.exp(log_probs).sum(axis=1), 1, rtol=1e-5)
  # From the plain distribution: an item of the history counts exp(bias) under each prefix, any other 1, and what is
  # under a prefix is weighed by the mean of that. The children of a node share what it has.
  ids = np.asarray(catalogue.semantic_ids).tolist()
  for user, history in enumerate(expected):
    mass, under = {}, {}
    for item in range(ITEMS):
      for level in range(LEVELS + 1):
        prefix = tuple(ids[item][:level])
        mass[prefix] = mass.get(prefix, 0.0) + np.exp(plain[user, item])
        under[prefix] = [*under.get(prefix, []), item]

    def weight(prefix, history=history, mass=mass, under=under):
      own = np.exp(BIAS_UNIT * float(biases[len(prefix) - 1]))
      factor = np.mean([own if item in history else 1.0 for item in under[prefix]])
      return mass[prefix] / mass[prefix[:-1]] * factor

    for item in range(ITEMS):
      total = 0.0
      for level in range(LEVELS):
        prefix = tuple(ids[item][: level + 1])
        siblings = {tuple(other[: level + 1]) for other in ids if other[:level] == ids[item][:level]}
        total += np.log(weight(prefix) / sum(map(weight, siblings)))
      assert log_probs[user, item] == pytest.approx(total, abs=2e-4)
  found = call(settings, "search", own, catalogue, states, width=ITEMS, seen=seen)
  assert_array_equal(found.items, np.argsort(-log_probs, axis=1))
  assert_allclose(found.log_probs, -np.sort(-log_probs, axis=1), atol=1e-4)


def over_all(settings):
  return dataclasses.replace(settings, softmax_over="all", subtree_logits=False, seen_item_bias=False)


@pytest.mark.parametrize(
  "settings",
  [GENERATIVE, NODES, over_all(GENERATIVE), T5, over_all(T5)],
  ids=["generative", "nodes", "all_codes", "encoder_decoder", "encoder_decoder_all_codes"],
)
def test_the_walk_gives_given_items_the_log_probabilities_that_the_loss_counts(
  random_params, settings, catalogue, items
):
  params = with_biases(
    random_params(Recommender(settings), catalogue, batch_of(settings, items)), np.array([0.11, -0.07, -0.2])
  )
  rows, _ = histories(items)
  states, seen = call(settings, "last_states", params, catalogue, rows), Recommender(settings).seen(rows)
  some = np.random.default_rng(2).integers(ITEMS, size=(3, 7))
  assert any(len(set(row)) < len(row) for row in some.tolist()), "no item is asked for twice"
  found = np.asarray(call(settings, "log_probs", params, catalogue, states, jnp.asarray(some), seen))

  @jax.jit
  def counted(params, states, seen, targets):
    def losses(model):
      return model.head.losses(model._items(catalogue, seen), states, targets, deterministic=True)

    parts = Recommender(settings).apply({"params": params}, method=losses)
    return -sum(parts.values())

  for column, targets in enumerate(some.T):
    assert_allclose(found[:, column], counted(params, states, seen, targets), rtol=1e-4)


@pytest.mark.parametrize("settings", [GENERATIVE, NODES, T5], ids=["generative", "nodes", "encoder_decoder"])
def test_the_gradient_of_the_generative_heads_biases_is_their_slope(random_params, settings, catalogue, items):
  batch, biases = batch_of(settings, items), np.array([0.11, -0.07, -0.2], np.float32)
  params = random_params(Recommender(settings), catalogue, batch)

  def value(biases):
    return loss(settings, params | {"head": params["head"] | {"seen_item_bias": biases}}, catalogue, batch)

  gradient = jax.grad(value)(jnp.asarray(biases))
  for level in range(LEVELS):
    step = np.float32(0.01) * np.eye(LEVELS, dtype=np.float32)[level]
    slope = (value(biases + step) - value(biases - step)) / 0.02
    assert abs(slope) > 0.01
    assert gradient[level] == pytest.approx(float(slope), rel=0.02)


def test_drawn_items_know_of_the_history_too(random_params, catalogue, items):
  # Every item drawn many times over: the estimate is the full softmax, nearly.
  settings = dataclasses.replace(DENSE, num_negatives=20_000)
  batch = batch_of(DENSE, items)
  params = with_biases(random_params(Recommender(DENSE), catalogue, batch), -0.2)
  rngs = {"dropout": jax.random.key(0)}
  estimate, _ = call(settings, "loss", params, catalogue, batch, deterministic=False, rngs=rngs)
  assert estimate == pytest.approx(float(loss(DENSE, params, catalogue, batch)), rel=0.02)
  assert estimate != pytest.approx(float(loss(DENSE, with_biases(params, 0.0), catalogue, batch)), rel=0.02)


def test_a_model_that_looks_at_the_history_must_be_given_it(catalogue, items):
  model, batch = Recommender(DENSE), batch_of(DENSE, items)
  params = jax.jit(model.init)(jax.random.key(0), catalogue, batch)["params"]
  with pytest.raises(ValueError, match="give it `seen`"):
    model.apply({"params": params}, catalogue, jnp.zeros((1, WIDTH)), method="scores")
