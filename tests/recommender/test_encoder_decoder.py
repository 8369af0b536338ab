"""The encoder-decoder against a forward pass in float64, its cached search against teacher forcing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.layers.apply import apply
from bbqrec_jax.ops.positions import relative_buckets
from bbqrec_jax.recommender.catalogue import Catalogue, code_columns
from bbqrec_jax.recommender.model import Recommender
from bbqrec_jax.recommender.settings import RecommenderSettings
from bbqrec_jax.semantic_ids.trie import build_trie

ITEMS, LEVELS, CODES, STREAMS, WIDTH, HEADS, HEAD_WIDTH, LAYERS = 11, 3, 4, 2, 8, 2, 3, 2
SETTINGS = RecommenderSettings(
  num_items=ITEMS, num_levels=LEVELS, num_codes=CODES, num_columns=2 * LEVELS, backbone="encoder_decoder", width=WIDTH,
  num_layers=LAYERS, num_heads=HEADS, head_width=HEAD_WIDTH, position_buckets=8, mlp_width=12, dropout=0.4,
  max_length=4, num_streams=STREAMS, cross_streams=True, table_buckets=4, subtree_logits=False, seen_item_bias=False,
)  # fmt: skip
SEGMENTS = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])


@pytest.fixture(scope="module")
def catalogue():
  rng = np.random.default_rng(0)
  ids = np.stack(np.unravel_index(rng.choice(CODES**LEVELS, ITEMS, replace=False), (CODES,) * LEVELS), axis=1)
  present = rng.random(ITEMS) < 0.7
  columns = code_columns(
    [ids, rng.integers(CODES, size=(ITEMS, LEVELS))], [np.ones(ITEMS, bool), present], num_codes=CODES
  )
  edges = np.sort(rng.uniform(-0.6, 0.6, size=(len(SETTINGS.pairs), SETTINGS.num_buckets - 1)), axis=1)
  return Catalogue(
    semantic_ids=jnp.asarray(ids, jnp.int32),
    columns=jnp.asarray(columns),
    streams=jnp.asarray(rng.normal(size=(ITEMS, STREAMS, 5)), jnp.float32),
    edges=jnp.asarray(edges, jnp.float32),
    trie=build_trie(ids),
  )


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(1)
  return {
    "items": rng.integers(ITEMS, size=SEGMENTS.shape), "targets": rng.integers(ITEMS, size=len(SEGMENTS)),
    "segments": SEGMENTS, "positions": np.tile(np.arange(4), (3, 1)),
  }  # fmt: skip


@pytest.fixture(scope="module")
def params(random_params, catalogue, batch):
  return random_params(Recommender(SETTINGS), catalogue, batch)


@functools.partial(jax.jit, static_argnames=("settings", "method", "width"))
def call(settings, method, params, catalogue, *args, **kwargs):
  return apply(Recommender(settings), params, method, catalogue, *args, **kwargs)


@functools.partial(jax.jit, static_argnames=("settings",))
def loss_and_gradient(settings, params, catalogue, batch):
  def loss(params):
    return Recommender(settings).apply({"params": params}, catalogue, batch, method="loss", deterministic=True)

  return jax.value_and_grad(loss, has_aux=True)(params)


def norm(x, params):
  return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6) * params["scale"]


def attend(x, memory, params, mask, bias):
  """One row: [T, d] attends to [S, d]; mask [T, S], bias [H, T, S]."""
  query, key, value = (
    np.einsum("td,dhe->the", y, params[name]["kernel"])
    for y, name in ((x, "query"), (memory, "key"), (memory, "value"))
  )
  mixed = np.zeros(query.shape)
  for h, t in np.ndindex(HEADS, len(x)):
    seen = np.flatnonzero(mask[t])
    scores = key[seen, h] @ query[t, h] / np.sqrt(HEAD_WIDTH) + bias[h, t, seen]
    weights = np.exp(scores - scores.max())
    mixed[t, h] = weights @ value[seen, h] / weights.sum()
  return np.einsum("the,hed->td", mixed, params["out"]["kernel"])


def feed(x, params, drop):
  hidden = drop(np.maximum(norm(x, params["mlp_norm"]) @ params["mlp_in"]["kernel"], 0))
  return drop(hidden @ params["mlp_out"]["kernel"])


def position_bias(table, queries, keys, bidirectional):
  buckets = relative_buckets(
    jnp.arange(keys)[None] - jnp.arange(queries)[:, None], num_buckets=8, bidirectional=bidirectional
  )
  return np.moveaxis(table[np.asarray(buckets)], -1, 0)


def oracle(params, catalogue, batch, bias, drop=lambda x: x):
  """Logits [B, L, K] of the targets' codes in float64, one history at a time; `drop` stands for dropout."""
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  ids, columns = np.asarray(catalogue.semantic_ids), np.asarray(catalogue.columns)
  logits = np.zeros((len(SEGMENTS), LEVELS, CODES))
  for row, count in enumerate(SEGMENTS.sum(axis=1)):
    tokens = []
    for item in batch["items"][row, :count]:
      rest = params["item_embedding"][item] + sum(
        params["code_embedding"][number] for number in columns[item, LEVELS:] if number >= 0
      )
      tokens += [params["code_embedding"][columns[item, level]] + rest for level in range(LEVELS)]
    x = drop(np.stack(tokens))
    encoder = params["backbone"]
    position = position_bias(encoder["position"]["table"], len(x), len(x), True)
    similar = bias[row][:, :count, :count].repeat(LEVELS, axis=1).repeat(LEVELS, axis=2)
    everything = np.ones((len(x), len(x)), bool)
    for index in range(LAYERS):
      layer = encoder[f"layer_{index}"]
      normed = norm(x, layer["self_norm"])
      x = x + drop(attend(normed, normed, layer["self_attention"], everything, position + similar))
      x = x + feed(x, layer, drop)
    memory = drop(norm(x, encoder["final_norm"]))

    head = params["head"]
    codes = ids[batch["targets"][row]]
    y = drop(np.stack([head["start_embedding"], *(head["code_embedding"][level, codes[level]] for level in range(2))]))
    position = position_bias(head["position"]["table"], LEVELS, LEVELS, False)
    causal = np.tri(LEVELS, dtype=bool)
    for index in range(LAYERS):
      layer = head[f"layer_{index}"]
      normed = norm(y, layer["self_norm"])
      y = y + drop(attend(normed, normed, layer["self_attention"], causal, position))
      nothing = np.zeros((HEADS, LEVELS, len(memory)))
      whole = np.ones((LEVELS, len(memory)), bool)
      y = y + drop(attend(norm(y, layer["cross_norm"]), memory, layer["cross_attention"], whole, nothing))
      y = y + feed(y, layer, drop)
    y = drop(norm(y, head["norm"]))
    for level in range(LEVELS):
      logits[row, level] = head["code_embedding"][level] @ y[level] / np.sqrt(WIDTH)
  return logits


def surprise(logits, catalogue, targets, over):
  """The negative log-likelihood of each code, [B, L]."""
  ids = np.asarray(catalogue.semantic_ids)
  result = np.zeros(logits.shape[:2])
  for row, target in enumerate(targets):
    for level in range(LEVELS):
      siblings = {other[level] for other in ids.tolist() if other[:level] == ids[target, :level].tolist()}
      among = sorted(siblings) if over == "existing" else range(CODES)
      values = logits[row, level]
      result[row, level] = np.log(np.exp(values[list(among)]).sum()) - values[ids[target, level]]
  return result


@pytest.mark.parametrize("over", ["existing", "all"])
def test_the_loss_of_a_batch_equals_a_forward_pass_in_float64(params, catalogue, batch, over):
  settings = dataclasses.replace(SETTINGS, softmax_over=over)
  bias = np.asarray(call(settings, "bias", params, catalogue, batch["items"], SEGMENTS), np.float64)
  assert np.abs(bias).max() > 0.1
  expected = surprise(oracle(params, catalogue, batch, bias), catalogue, batch["targets"], over)
  (value, terms), gradient = loss_and_gradient(settings, params, catalogue, batch)
  for level in range(LEVELS):
    assert_allclose(terms[f"nll_level_{level + 1}"], expected[:, level].mean(), rtol=2e-4)
  assert_allclose(value, expected.sum(axis=1).mean(), rtol=2e-4)
  for part in ("backbone", "head", "code_embedding", "item_embedding", "similarity_tables"):
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient[part])), part


@pytest.mark.usefixtures("doubling_dropout")
def test_dropout_is_on_inputs_on_every_branch_and_on_outputs_in_training_alone(params, catalogue, batch):
  bias = np.asarray(call(SETTINGS, "bias", params, catalogue, batch["items"], SEGMENTS), np.float64)

  @functools.partial(jax.jit, static_argnames="deterministic")
  def terms(params, deterministic):
    model = Recommender(SETTINGS)
    return model.apply({"params": params}, catalogue, batch, method="loss", deterministic=deterministic)[1]

  for deterministic, drop in ((False, lambda x: 2.0 * x), (True, lambda x: x)):
    logits = oracle(params, catalogue, batch, bias, drop)
    expected = surprise(logits, catalogue, batch["targets"], SETTINGS.softmax_over)
    got = terms(params, deterministic)
    for level in range(LEVELS):
      assert_allclose(got[f"nll_level_{level + 1}"], expected[:, level].mean(), rtol=1e-3)


@pytest.mark.parametrize(
  "changes",
  [{}, {"table_buckets": 0}, {"dtype": "bfloat16"}],
  ids=str,
)
def test_zero_tables_make_it_the_plain_backbone_bit_for_bit(random_params, catalogue, batch, changes):
  settings = dataclasses.replace(SETTINGS, **changes)
  params = random_params(Recommender(settings), catalogue, batch)
  tables = params["similarity_tables"]
  shared = {name: value for name, value in params.items() if name != "similarity_tables"}
  plain = np.asarray(call(dataclasses.replace(settings, num_streams=0), "states", shared, catalogue, batch).tokens)
  zero = shared | {"similarity_tables": np.zeros_like(tables)}
  assert_array_equal(call(settings, "states", zero, catalogue, batch).tokens, plain)
  moved = (np.asarray(call(settings, "states", params, catalogue, batch).tokens) != plain).any(axis=-1)
  assert moved[0].all()


def test_what_stands_at_padding_changes_no_real_token(params, catalogue, batch):
  before = call(SETTINGS, "states", params, catalogue, batch)
  other = batch | {"items": np.where(SEGMENTS == 0, (batch["items"] + 1) % ITEMS, batch["items"])}
  after = call(SETTINGS, "states", params, catalogue, other)
  real = np.asarray(before.real)
  assert_array_equal(real, SEGMENTS.repeat(LEVELS, axis=1) > 0)
  assert_array_equal(np.asarray(after.tokens)[real], np.asarray(before.tokens)[real])


@pytest.mark.parametrize("over", ["existing", "all", "nodes"])
def test_a_beam_as_wide_as_the_catalogue_is_the_exact_ranking(params, catalogue, batch, over):
  settings = dataclasses.replace(SETTINGS, softmax_over=over)
  if over == "nodes":
    prior = np.random.default_rng(5).normal(size=ITEMS).astype(np.float32)
    params = params | {"head": params["head"] | {"subtree_logits": {"prior": prior}}}
    settings = dataclasses.replace(SETTINGS, subtree_logits=True)
  memory = call(settings, "last_states", params, catalogue, batch)
  every = jnp.tile(jnp.arange(ITEMS), (3, 1))
  log_probs = np.asarray(call(settings, "log_probs", params, catalogue, memory, every))
  order = np.argsort(-log_probs, axis=1)
  found = call(settings, "search", params, catalogue, memory, width=ITEMS + 2)
  assert_array_equal(found.items, np.pad(order, ((0, 0), (0, 2)), constant_values=-1))
  assert_allclose(found.log_probs[:, :ITEMS], np.take_along_axis(log_probs, order, axis=1), atol=1e-4)
  if over != "all":
    assert_allclose(np.exp(log_probs.astype(np.float64)).sum(axis=1), np.ones(3), rtol=1e-4)


@pytest.mark.parametrize("head", ["dense", "parallel"])
def test_other_heads_read_the_mean_of_the_memory(random_params, catalogue, batch, head):
  settings = dataclasses.replace(SETTINGS, head=head)
  params = random_params(Recommender(settings), catalogue, batch)
  memory = call(settings, "states", params, catalogue, batch)
  state = call(settings, "last_states", params, catalogue, batch)
  for row, count in enumerate(SEGMENTS.sum(axis=1)):
    assert_allclose(state[row], np.asarray(memory.tokens)[row, : count * LEVELS].mean(axis=0), atol=1e-5)
  (value, _), _ = loss_and_gradient(settings, params, catalogue, batch)
  chosen = call(settings, "log_probs", params, catalogue, state, batch["targets"][:, None])
  assert_allclose(value, -np.mean(chosen), rtol=1e-5)
