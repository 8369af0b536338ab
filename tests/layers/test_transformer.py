"""The causal backbone against NumPy in float64: its bias, places, times and dropout, and layers fed piece by piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.layers.transformer import CausalBackbone, SelfAttention, TransformerLayer
from bbqrec_jax.ops.attention import history_mask
from bbqrec_jax.ops.positions import relative_buckets

OPTIMIZED = True

BATCH, LENGTH, WIDTH, HEADS, MAX_LENGTH = 2, 6, 8, 2, 5
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
POSITIONS = np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
MODEL = CausalBackbone(num_layers=2, num_heads=HEADS, mlp_width=12, max_length=MAX_LENGTH, dropout=0.5)


@pytest.fixture(scope="module")
def params(random_params):
  return random_params(MODEL, jnp.zeros((1, 2, WIDTH)), jnp.ones((1, 2), int), jnp.zeros((1, 2), int))


@jax.jit
def run(params, x, segments, positions, bias):
  return MODEL.apply({"params": params}, x, segments, positions, bias)


def inputs(seed=0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
  return x, rng.normal(size=(BATCH, HEADS, LENGTH, LENGTH)).astype(np.float32)


def layer_norm(x, params):
  x = x - x.mean(axis=-1, keepdims=True)
  return x / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6) * params["scale"] + params["bias"]


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def oracle(params, x, bias, drop=lambda x: x):
  """The whole backbone in float64, one head and one position at a time; `drop` stands for dropout."""
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  mask = np.asarray(history_mask(jnp.asarray(SEGMENTS)))
  x = x + params["position"]["embedding"][np.minimum(POSITIONS, MAX_LENGTH - 1)]
  x = drop(x)
  for layer in (params["layer_0"], params["layer_1"]):
    normed, parts = layer_norm(x, layer["LayerNorm_0"]), layer["attention"]
    query, key, value = (
      np.einsum("btd,dhe->bthe", normed, parts[name]["kernel"]) + parts[name]["bias"]
      for name in ("query", "key", "value")
    )
    mixed = np.zeros(query.shape)
    for b, h, t in np.ndindex(BATCH, HEADS, LENGTH):
      seen = np.flatnonzero(mask[b, 0, t])
      scores = key[b, seen, h] @ query[b, t, h] / np.sqrt(WIDTH / HEADS) + bias[b, h, t, seen]
      weights = np.exp(scores - scores.max())
      mixed[b, t, h] = weights @ value[b, seen, h] / weights.sum()
    x = x + drop(np.einsum("bthe,hed->btd", mixed, parts["out"]["kernel"]) + parts["out"]["bias"])
    hidden = gelu(layer_norm(x, layer["LayerNorm_1"]) @ layer["Dense_0"]["kernel"] + layer["Dense_0"]["bias"])
    x = x + drop(hidden @ layer["Dense_1"]["kernel"] + layer["Dense_1"]["bias"])
  return layer_norm(x, params["final_norm"])


def test_backbone_equals_numpy(params):
  x, bias = inputs()
  assert_allclose(run(params, x, SEGMENTS, POSITIONS, bias), oracle(params, x, bias), atol=2e-5)
  assert_allclose(run(params, x, SEGMENTS, POSITIONS, None), oracle(params, x, np.zeros_like(bias)), atol=2e-5)


@pytest.mark.parametrize("post_norm", [False, True])
def test_rows_of_one_history_give_their_last_state_with_places_from_the_end(random_params, post_norm):
  x, bias = inputs()
  segments = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
  positions = np.tile(np.arange(6), (2, 1))
  fields = {"num_layers": 2, "num_heads": HEADS, "mlp_width": 12, "max_length": MAX_LENGTH, "post_norm": post_norm}
  every, last = CausalBackbone(**fields), CausalBackbone(**fields, whole_rows=True)
  params = random_params(every, x, segments, positions)
  from_end = np.maximum(segments.sum(1, keepdims=True) - 1 - positions, 0)
  expected = jax.jit(every.apply)({"params": params}, x, segments, from_end, bias)[np.arange(2), segments.sum(1) - 1]
  assert_allclose(jax.jit(last.apply)({"params": params}, x, segments, positions, bias), expected, atol=2e-5)


@pytest.mark.parametrize("whole_rows", [False, True])
def test_relative_positions_are_a_bias_by_distance_alike_in_a_packed_row_and_alone(random_params, whole_rows):
  x, bias = inputs()
  fields = {"num_layers": 2, "num_heads": HEADS, "mlp_width": 12, "max_length": MAX_LENGTH}
  model = CausalBackbone(**fields, relative_buckets=4)
  params = random_params(model, x, SEGMENTS, POSITIONS)
  packed = jax.jit(model.apply)({"params": params}, x, SEGMENTS, POSITIONS, bias)
  # The same as the table's numbers by hand, on a backbone that knows of no places.
  table, place = params["relative"]["table"], np.arange(LENGTH)
  bucket = np.asarray(relative_buckets(place[None] - place[:, None], num_buckets=4, bidirectional=False))
  plain = {
    **{name: part for name, part in params.items() if name != "relative"},
    "position": {"embedding": np.zeros((MAX_LENGTH, WIDTH))},
  }
  by_hand = bias + np.moveaxis(table[bucket], -1, 0)
  assert_allclose(packed, oracle(plain, x, by_hand), atol=3e-5)
  # A history by itself, from the start of a row, has the states that it has among others.
  alone = jax.jit(CausalBackbone(**fields, relative_buckets=4, whole_rows=whole_rows).apply)
  moved = np.roll(x[0], -3, axis=0), np.roll(bias[0], (-3, -3), axis=(1, 2))
  first = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
  states = alone(
    {"params": params}, np.stack([x[0], moved[0]]), first, POSITIONS[1] * first, np.stack([bias[0], moved[1]])
  )
  for row, last in enumerate((2, 1)):
    assert_allclose(states[row] if whole_rows else states[row, last], packed[0, (2, 4)[row]], atol=3e-5)


def test_post_norm_normalises_each_sum(random_params):
  x, _ = inputs()
  layer = TransformerLayer(num_heads=HEADS, mlp_width=12, post_norm=True)
  mask = np.tril(np.ones((1, 1, 6, 6), bool))
  params = random_params(MODEL, x, SEGMENTS, POSITIONS)["layer_0"]
  attended = np.asarray(SelfAttention(HEADS).apply({"params": params["attention"]}, x, mask)[0])
  x = layer_norm(x + attended, params["LayerNorm_0"])
  hidden = gelu(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
  expected = layer_norm(x + hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"], params["LayerNorm_1"])
  assert_allclose(layer.apply({"params": params}, inputs()[0], mask, deterministic=True)[0], expected, atol=2e-5)


@pytest.mark.usefixtures("doubling_dropout")
def test_attention_dropout_is_on_the_weights_in_training_alone(random_params):
  x, _ = inputs()
  mask = np.tril(np.ones((1, 1, 6, 6), bool))
  plain, dropping = SelfAttention(HEADS), SelfAttention(HEADS, dropout=0.5)
  params = random_params(plain, x, mask)
  bias = params["out"]["bias"]
  whole = np.asarray(plain.apply({"params": params}, x, mask)[0])
  assert_array_equal(dropping.apply({"params": params}, x, mask)[0], whole)
  trained = np.asarray(dropping.apply({"params": params}, x, mask, deterministic=False)[0])
  assert_allclose(trained - bias, 2 * (whole - bias), atol=2e-5)


def test_zero_bias_is_bit_equal_to_no_bias_and_another_bias_is_not(params):
  x, bias = inputs()
  plain = np.asarray(run(params, x, SEGMENTS, POSITIONS, None))
  assert_array_equal(run(params, x, SEGMENTS, POSITIONS, np.zeros_like(bias)), plain)
  # A history's first position sees itself alone, so no bias can move it.
  moved = (np.asarray(run(params, x, SEGMENTS, POSITIONS, bias)) != plain).any(axis=-1)
  assert_array_equal(moved, (POSITIONS > 0) & (SEGMENTS > 0))


def test_places_matter_and_those_beyond_the_longest_history_share_the_last(params):
  x, bias = inputs()
  last = run(params, x, SEGMENTS, np.full_like(POSITIONS, MAX_LENGTH - 1), bias)
  assert_array_equal(run(params, x, SEGMENTS, np.full_like(POSITIONS, MAX_LENGTH + 40), bias), last)
  assert (np.asarray(run(params, x, SEGMENTS, np.full_like(POSITIONS, MAX_LENGTH - 2), bias)) != last).any()


def test_dropout_draws_by_its_key(params):
  x, bias = inputs()

  @jax.jit
  def dropped(key):
    return MODEL.apply({"params": params}, x, SEGMENTS, POSITIONS, bias, deterministic=False, rngs={"dropout": key})

  one, again, two = (np.asarray(dropped(jax.random.key(seed))) for seed in (0, 0, 1))
  assert_array_equal(one, again)
  assert (one != two).any()


@pytest.mark.usefixtures("doubling_dropout")
@pytest.mark.parametrize("deterministic", [False, True])
def test_dropout_is_on_the_input_and_every_branch_in_training_alone(params, deterministic):
  x, bias = inputs()
  got = MODEL.apply({"params": params}, x, SEGMENTS, POSITIONS, bias, deterministic=deterministic)
  expected = oracle(params, x, bias, drop=lambda x: x if deterministic else 2.0 * x)
  assert_allclose(got, expected, atol=2e-5)


def test_a_layer_fed_one_position_at_a_time_gives_what_it_gives_in_one_pass(params):
  layer = TransformerLayer(num_heads=HEADS, mlp_width=12)
  x, _ = inputs()

  @jax.jit
  def both(x):
    def step(x, mask, cache=None):
      return layer.apply({"params": params["layer_0"]}, x, mask, None, cache, deterministic=True)

    whole = step(x[:, :3], jnp.tril(jnp.ones((1, 1, 3, 3), bool)))
    outs, cache = [], None
    for t in range(3):
      out, cache = step(x[:, t : t + 1], jnp.ones((1, 1, 1, t + 1), bool), cache)
      outs.append(out)
    return whole, (jnp.concatenate(outs, axis=1), cache)

  whole, stepped = both(x)
  jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), stepped, whole)


TIMED = CausalBackbone(num_layers=2, num_heads=HEADS, mlp_width=12, max_length=MAX_LENGTH, dropout=0.5, time_buckets=8)
TIMES = np.array([[0, 3, 40, 7, 7, 0], [5, 5, 6, 20, 90, 91]])


@jax.jit
def timed(params, x, bias, times):
  return TIMED.apply({"params": params}, x, SEGMENTS, POSITIONS, bias, times)


def test_time_between_interactions_is_a_bias_by_its_bucket(params):
  x, bias = inputs()
  table = np.random.default_rng(1).normal(size=(8, HEADS)).astype(np.float32)
  gap = np.maximum(TIMES[:, :, None] - TIMES[:, None, :], 0)
  bucket = np.minimum([[[int(g).bit_length() for g in row] for row in rows] for rows in gap], 7)
  expected = run(params, x, SEGMENTS, POSITIONS, bias + np.moveaxis(table[bucket], -1, 1))
  own = params | {"time": {"table": table}}
  real = SEGMENTS > 0
  assert_allclose(np.asarray(timed(own, x, bias, TIMES))[real], np.asarray(expected)[real], atol=1e-5)
  assert_allclose(timed(own, x, bias, TIMES + 1000), timed(own, x, bias, TIMES), atol=1e-6)
  zero = params | {"time": {"table": np.zeros_like(table)}}
  assert_array_equal(timed(zero, x, bias, TIMES), run(params, x, SEGMENTS, POSITIONS, bias))
