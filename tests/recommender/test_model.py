"""The recommender: a plain backbone while its tables are zero, causal, blind to padding, and exact in its losses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.layers.apply import apply
from bbqrec_jax.ops.softmax import sampled_cross_entropy
from bbqrec_jax.recommender import heads
from bbqrec_jax.recommender.catalogue import Catalogue, code_columns
from bbqrec_jax.recommender.generative import GenerativeHead
from bbqrec_jax.recommender.heads import DenseHead, ParallelHead
from bbqrec_jax.recommender.model import Recommender
from bbqrec_jax.recommender.parts import Items
from bbqrec_jax.recommender.settings import RecommenderSettings
from bbqrec_jax.recommender.subtree_logits import SubtreeLogits
from bbqrec_jax.recommender.two_towers import make_recommender
from bbqrec_jax.semantic_ids.trie import build_trie

ITEMS, LEVELS, CODES, STREAMS, WIDTH = 12, 3, 4, 2, 8
SETTINGS = RecommenderSettings(
  norm="pre",
  num_items=ITEMS, num_levels=LEVELS, num_codes=CODES, num_columns=2 * LEVELS, width=WIDTH, num_layers=1, num_heads=2,
  mlp_width=12, depth_layers=1, dropout=0.4, max_length=6, num_streams=STREAMS, cross_streams=True, table_buckets=4,
  subtree_logits=False, seen_item_bias=False, cosine=False,
)  # fmt: skip
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
POSITIONS = np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [0, 1, 0, 0, 0, 0]])


@pytest.fixture(scope="module")
def catalogue():
  rng = np.random.default_rng(0)
  ids = np.stack(np.unravel_index(rng.choice(CODES**LEVELS, ITEMS, replace=False), (CODES,) * LEVELS), axis=1)
  present = rng.random(ITEMS) < 0.7
  columns = code_columns(
    [ids, rng.integers(CODES, size=(ITEMS, LEVELS))], [np.ones(ITEMS, bool), present], num_codes=CODES
  )
  vectors = rng.normal(size=(ITEMS, STREAMS, 5))
  vectors[~present, 1] = 0
  edges = np.sort(rng.uniform(-0.6, 0.6, size=(len(SETTINGS.pairs), SETTINGS.table_buckets - 1)), axis=1)
  return Catalogue(
    semantic_ids=jnp.asarray(ids, jnp.int32),
    columns=jnp.asarray(columns),
    streams=jnp.asarray(vectors, jnp.float32),
    edges=jnp.asarray(edges, jnp.float32),
    trie=build_trie(ids),
  )


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(1)
  items, targets = rng.integers(ITEMS, size=(2, *SEGMENTS.shape))
  return {"items": items, "targets": targets, "segments": SEGMENTS, "positions": POSITIONS}


@pytest.fixture(scope="module")
def params(random_params, catalogue, batch):
  """Parameters of which none is zero, the similarity tables among them."""
  return random_params(Recommender(SETTINGS), catalogue, batch)


@pytest.fixture(scope="module")
def node_params(params):
  """The same and a prior of each item."""
  prior = np.random.default_rng(5).normal(size=ITEMS).astype(np.float32)
  return params | {"head": params["head"] | {"subtree_logits": {"prior": prior}}}


@pytest.fixture(scope="module")
def fresh(params):
  """The same with zero tables."""
  return params | {"similarity_tables": np.zeros_like(params["similarity_tables"])}


@functools.partial(jax.jit, static_argnames=("settings", "method"))
def call(settings, method, params, catalogue, *args):
  return Recommender(settings).apply({"params": params}, catalogue, *args, method=method)


def states(params, catalogue, batch, settings=SETTINGS):
  return np.asarray(call(settings, "states", params, catalogue, batch))


@functools.partial(jax.jit, static_argnames=("settings",))
def loss_and_gradient(settings, params, catalogue, batch):
  def loss(params):
    return Recommender(settings).apply({"params": params}, catalogue, batch, method="loss", deterministic=True)

  return jax.value_and_grad(loss, has_aux=True)(params)


def test_tables_start_at_zero(catalogue, batch):
  def tables(key):
    return Recommender(SETTINGS).init(key, catalogue, batch)["params"]["similarity_tables"]

  start = jax.jit(tables)(jax.random.key(0))
  assert_array_equal(start, np.zeros((len(SETTINGS.pairs), SETTINGS.num_heads, SETTINGS.table_buckets + 2)))


def test_zero_tables_make_it_the_plain_backbone_bit_for_bit_and_other_tables_do_not(fresh, params, catalogue, batch):
  plain = dataclasses.replace(SETTINGS, num_streams=0)
  shared = {name: value for name, value in fresh.items() if name != "similarity_tables"}
  needed = jax.eval_shape(Recommender(plain).init, jax.random.key(0), catalogue, batch)["params"]
  assert jax.tree.structure(shared) == jax.tree.structure(needed)
  expected = states(shared, catalogue, batch, settings=plain)
  assert_array_equal(states(fresh, catalogue, batch), expected)
  changed = (states(params, catalogue, batch) != expected).any(axis=-1)
  assert_array_equal(changed, (POSITIONS > 0) & (SEGMENTS > 0))


def test_a_slope_in_place_of_buckets_starts_as_the_plain_backbone_too(random_params, catalogue, batch):
  settings = dataclasses.replace(SETTINGS, table_buckets=0)
  params = random_params(Recommender(settings), catalogue, batch)
  tables = params["similarity_tables"]
  assert tables.shape == settings.table_shape
  plain = dataclasses.replace(settings, num_streams=0)
  shared = {name: value for name, value in params.items() if name != "similarity_tables"}
  expected = states(shared, catalogue, batch, settings=plain)
  zero = shared | {"similarity_tables": np.zeros_like(tables)}
  assert_array_equal(states(zero, catalogue, batch, settings=settings), expected)
  assert (states(params, catalogue, batch, settings=settings) != expected).any()


def test_zero_tables_have_a_gradient_and_so_can_leave_zero(fresh, catalogue, batch):
  _, gradient = loss_and_gradient(SETTINGS, fresh, catalogue, batch)
  assert (np.abs(gradient["similarity_tables"]).max(axis=(1, 2)) > 0).all()


def test_each_pair_of_streams_has_its_own_table_and_each_changes_the_states(fresh, params, catalogue, batch):
  assert SETTINGS.pairs == ((0, 0), (1, 1), (0, 1))
  plain = states(fresh, catalogue, batch)
  for pair in range(len(SETTINGS.pairs)):
    tables = np.where(np.arange(len(SETTINGS.pairs))[:, None, None] == pair, params["similarity_tables"], 0)
    assert (states(fresh | {"similarity_tables": tables}, catalogue, batch) != plain).any()


@pytest.mark.parametrize("place", [1, 3, 5])
def test_a_future_item_never_changes_an_earlier_state(params, catalogue, batch, place):
  before = states(params, catalogue, batch)
  items = batch["items"].copy()
  items[:, place:] = (items[:, place:] + 1) % ITEMS
  after = states(params, catalogue, batch | {"items": items})
  assert_array_equal(after[:, :place], before[:, :place])
  assert (after[1, place:] != before[1, place:]).any(axis=-1).all()


def test_what_stands_at_padding_never_changes_a_real_state(params, catalogue, batch):
  before = states(params, catalogue, batch)
  items = np.where(SEGMENTS == 0, (batch["items"] + 1) % ITEMS, batch["items"])
  after = states(params, catalogue, batch | {"items": items})
  assert_array_equal(after[SEGMENTS > 0], before[SEGMENTS > 0])
  assert (after[SEGMENTS == 0] != before[SEGMENTS == 0]).any()


def test_a_packed_history_gives_the_states_it_gives_alone_in_a_row(params, catalogue, batch):
  packed = states(params, catalogue, batch)
  histories = ((0, 0, 3), (0, 3, 5), (2, 0, 2))
  items, segments = np.zeros((2, *SEGMENTS.shape), int)
  for alone, (row, start, stop) in enumerate(histories):
    items[alone, : stop - start] = batch["items"][row, start:stop]
    segments[alone, : stop - start] = 1
  rows = {"items": items, "segments": segments, "positions": np.tile(np.arange(6), (3, 1))}
  got = states(params, catalogue, rows)
  for alone, (row, start, stop) in enumerate(histories):
    assert_allclose(got[alone, : stop - start], packed[row, start:stop], atol=1e-5)


def test_last_states_are_those_of_the_last_real_position(params, catalogue, batch):
  segments = (np.arange(6) < np.array([[6], [3], [1]])).astype(int)
  rows = {"items": batch["items"], "segments": segments, "positions": np.tile(np.arange(6), (3, 1))}
  last = call(SETTINGS, "last_states", params, catalogue, rows)
  every = states(params, catalogue, rows)
  assert_allclose(last, np.stack([every[0, 5], every[1, 2], every[2, 0]]), atol=1e-6)


def numpy_item_vectors(params, catalogue):
  result = np.asarray(params["item_embedding"], np.float64).copy()
  for item, row in enumerate(np.asarray(catalogue.columns)):
    for number in row[row >= 0]:
      result[item] += params["code_embedding"][number]
  return result


def test_item_vectors_sum_the_items_own_vector_and_its_present_codes(params, catalogue):
  assert (np.asarray(catalogue.columns) < 0).any(), "no modality is absent: the example leaves that untried"
  expected = numpy_item_vectors(params, catalogue)
  assert_allclose(call(SETTINGS, "item_vectors", params, catalogue), expected, atol=1e-6)
  some = jnp.array([[3, 0], [11, 3]])
  assert_allclose(call(SETTINGS, "item_vectors", params, catalogue, some), expected[np.asarray(some)], atol=1e-6)


def test_code_columns_number_every_stream_level_and_code_apart():
  rng = np.random.default_rng(3)
  codes = [rng.integers(CODES, size=(ITEMS, levels)) for levels in (3, 2)]
  present = [np.ones(ITEMS, bool), rng.random(ITEMS) < 0.5]
  columns = code_columns(codes, present, num_codes=CODES)
  for item in range(ITEMS):
    first = [level * CODES + codes[0][item, level] for level in range(3)]
    second = [(3 + level) * CODES + codes[1][item, level] if present[1][item] else -1 for level in range(2)]
    assert columns[item].tolist() == first + second


DENSE = dataclasses.replace(SETTINGS, head="dense")


@pytest.fixture(scope="module")
def dense_params(params):
  return {name: value for name, value in params.items() if name != "head"}


def test_dense_loss_is_the_cross_entropy_over_all_items_at_real_positions(dense_params, catalogue, batch):
  scores = states(dense_params, catalogue, batch, settings=DENSE).astype(np.float64)
  scores = scores @ numpy_item_vectors(dense_params, catalogue).T
  chosen = np.take_along_axis(scores, batch["targets"][..., None], axis=-1)[..., 0]
  surprise = np.log(np.exp(scores).sum(axis=-1)) - chosen
  (value, terms), _ = loss_and_gradient(DENSE, dense_params, catalogue, batch)
  assert_allclose(value, surprise[SEGMENTS > 0].mean(), rtol=1e-5)
  assert terms["nll"] == value


def test_drawn_negatives_are_for_training_alone_and_change_with_its_key(dense_params, catalogue, batch):
  settings = dataclasses.replace(DENSE, num_negatives=7, dropout=0.0)
  params = jax.tree.map(jnp.asarray, dense_params)

  @functools.partial(jax.jit, static_argnames="deterministic")
  def loss(key, deterministic):
    return Recommender(settings).apply(
      {"params": params}, catalogue, batch, method="loss", deterministic=deterministic, rngs={"dropout": key}
    )[0]

  (full, _), _ = loss_and_gradient(DENSE, dense_params, catalogue, batch)
  assert_allclose(loss(jax.random.key(0), True), full, rtol=1e-6)
  drawn = [float(loss(jax.random.key(seed), False)) for seed in range(20)]
  assert len(set(drawn)) == 20
  # By Jensen's inequality a little less on average, and near.
  assert 0.6 * full < np.mean(drawn) < 1.05 * full


@pytest.mark.parametrize(
  ("num_items", "num_negatives", "drawn"), [(8191, -1, 0), (8192, -1, 1024), (10**6, 0, 0), (50, 7, 7)]
)
def test_items_stand_for_others_in_large_catalogues_or_as_asked(num_items, num_negatives, drawn):
  settings = dataclasses.replace(DENSE, num_items=num_items, num_negatives=num_negatives)
  assert settings.drawn_items == drawn


def test_every_item_can_be_drawn_as_a_negative_and_none_beside_them(catalogue, monkeypatch):
  seen = []

  def spy(*args, num_items, **options):
    seen.append((args[-1], num_items))
    return sampled_cross_entropy(*args, num_items=num_items, **options)

  monkeypatch.setattr(heads, "sampled_cross_entropy", spy)
  items = Items(catalogue, lambda some: jnp.ones((*some.shape, WIDTH)))
  head, targets = DenseHead(dataclasses.replace(DENSE, num_negatives=600)), jnp.arange(5)
  head.apply(
    {}, items, jnp.ones((5, WIDTH)), targets, deterministic=False, method="losses", rngs={"dropout": jax.random.key(0)}
  )
  ((drawn, count),) = seen
  assert count == ITEMS
  often = np.bincount(drawn, minlength=ITEMS)
  assert often.shape == (ITEMS,)
  # Each about 50 times: 5 standard deviations are 34.
  assert often.min() > 16
  assert often.max() < 84


def test_generative_loss_is_the_negative_log_probability_of_the_targets_ids(params, catalogue, batch):
  every = jnp.asarray(states(params, catalogue, batch).reshape(-1, WIDTH))
  log_probs = call(SETTINGS, "log_probs", params, catalogue, every, batch["targets"].reshape(-1, 1))[:, 0]
  (value, terms), _ = loss_and_gradient(SETTINGS, params, catalogue, batch)
  assert_allclose(value, -np.asarray(log_probs, np.float64)[SEGMENTS.reshape(-1) > 0].mean(), rtol=1e-5)
  assert_allclose(sum(terms[f"nll_level_{level + 1}"] for level in range(LEVELS)), value, rtol=1e-6)


@pytest.mark.parametrize("head", ["generative", "dense"])
def test_masked_positions_change_neither_the_loss_nor_its_gradient(params, dense_params, catalogue, batch, head):
  settings, own = (SETTINGS, params) if head == "generative" else (DENSE, dense_params)
  other = {
    name: np.where(SEGMENTS == 0, (batch[name] + 1) % ITEMS, batch[name]) for name in ("items", "targets")
  }  # fmt: skip
  (value, _), gradient = loss_and_gradient(settings, own, catalogue, batch)
  (other_value, _), other_gradient = loss_and_gradient(settings, own, catalogue, batch | other)
  assert other_value == value
  jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-7), other_gradient, gradient)
  real = {"targets": np.where(SEGMENTS == 0, batch["targets"], (batch["targets"] + 1) % ITEMS)}
  assert loss_and_gradient(settings, own, catalogue, batch | real)[0][0] != value


@functools.partial(jax.jit, static_argnames="settings")
def generate(settings, params, catalogue, queries, exclude):
  """Two more items than there are."""
  return Recommender(settings).apply(
    {"params": params}, catalogue, queries, width=ITEMS + 2, exclude=exclude, method="search"
  )


ALL_CODES = dataclasses.replace(SETTINGS, softmax_over="all")
NODES = dataclasses.replace(SETTINGS, subtree_logits=True)
EACH = pytest.mark.parametrize("settings", [SETTINGS, ALL_CODES, NODES], ids=["existing", "all", "nodes"])


@pytest.fixture(scope="module")
def queries():
  return jnp.asarray(np.random.default_rng(4).normal(size=(3, WIDTH)), jnp.float32)


@pytest.fixture(scope="module")
def exact(node_params, catalogue, queries):
  """A function from settings to the log-probability of every item."""
  every = jnp.tile(jnp.arange(ITEMS), (3, 1))
  return lambda settings: np.asarray(call(settings, "log_probs", node_params, catalogue, queries, every))


@EACH
def test_log_probs_are_those_of_the_heads_logits_among_the_codes_they_compete_with(
  node_params, catalogue, queries, exact, settings
):
  ids = np.asarray(catalogue.semantic_ids)
  head = GenerativeHead(SETTINGS)
  vectors = np.asarray(call(settings, "item_vectors", node_params, catalogue), np.float64)
  prior = np.exp(node_params["head"]["subtree_logits"]["prior"].astype(np.float64))
  log_probs = exact(settings)
  alone = 0
  for query in range(len(queries)):
    states = jnp.tile(queries[query], (ITEMS, 1))
    logits, hidden = head.apply({"params": node_params["head"]}, states, jnp.asarray(ids))
    logits, hidden = np.stack(logits, axis=1).astype(np.float64), np.asarray(hidden, np.float64)
    for item in range(ITEMS):
      expected = 0.0
      for level in range(LEVELS):
        siblings = {row[level] for row in ids.tolist() if row[:level] == ids[item, :level].tolist()}
        among = sorted(siblings) if settings.softmax_over == "existing" else range(CODES)
        alone += len(siblings) == 1
        row = logits[item, level].copy()
        for code in siblings if settings.subtree_logits else ():
          below = np.all(ids[:, : level + 1] == [*ids[item, :level], code], axis=1)
          mean = prior[below] @ vectors[below] / prior[below].sum()
          row[code] += np.log(prior[below].sum()) + hidden[item, level] @ mean
        expected += row[ids[item, level]] - np.log(np.exp(row[list(among)]).sum())
      assert_allclose(log_probs[query, item], expected, atol=1e-4)
  assert alone > 0, "no code is without competition: the example leaves that untried"


def test_probabilities_of_the_existing_items_sum_to_one(exact):
  for settings in (SETTINGS, NODES):
    assert_allclose(np.exp(exact(settings).astype(np.float64)).sum(axis=1), np.ones(3), rtol=1e-5)
  assert np.exp(exact(ALL_CODES)).sum(axis=1).max() < 0.9, "the others spend theirs on IDs that no item has"


@EACH
def test_generating_as_many_items_as_exist_gives_the_exact_ranking(node_params, catalogue, queries, exact, settings):
  log_probs = exact(settings)
  order = np.argsort(-log_probs, axis=1)
  assert np.diff(np.take_along_axis(log_probs, order, axis=1)).max() < -1e-4, "near-ties: the order would be chance"
  result = generate(settings, node_params, catalogue, queries, jnp.full((3, 4), -1))
  assert_array_equal(result.items, np.pad(order, ((0, 0), (0, 2)), constant_values=-1))
  assert_allclose(result.log_probs[:, :ITEMS], np.take_along_axis(log_probs, order, axis=1), atol=1e-5)


@EACH
def test_generating_leaves_out_excluded_items_and_changes_no_others_probability(
  node_params, catalogue, queries, exact, settings
):
  log_probs = exact(settings)
  order = np.argsort(-log_probs, axis=1)
  result = generate(settings, node_params, catalogue, queries, jnp.asarray(order[:, :4]))
  assert_array_equal(result.items, np.pad(order[:, 4:], ((0, 0), (0, 6)), constant_values=-1))
  assert_allclose(result.log_probs[:, : ITEMS - 4], np.take_along_axis(log_probs, order[:, 4:], axis=1), atol=1e-5)


PARALLEL = dataclasses.replace(SETTINGS, head="parallel")


@pytest.fixture(scope="module")
def parallel_params(random_params, catalogue, batch):
  return random_params(Recommender(PARALLEL), catalogue, batch)


def test_parallel_scores_are_sums_of_log_probabilities_that_know_nothing_of_one_another(
  parallel_params, catalogue, queries
):
  per_level = np.asarray(ParallelHead(PARALLEL).apply({"params": parallel_params["head"]}, queries), np.float64)
  head, states = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (parallel_params["head"], queries))

  def dense(x, name):
    return x @ head[name]["kernel"] + head[name]["bias"]

  for level in range(LEVELS):
    hidden = dense(states, f"hidden_{level}")
    hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    hidden = states + dense(hidden, f"out_{level}")
    hidden = (hidden - hidden.mean(axis=-1, keepdims=True)) / np.sqrt(hidden.var(axis=-1, keepdims=True) + 1e-6)
    hidden = hidden * head[f"norm_{level}"]["scale"] + head[f"norm_{level}"]["bias"]
    logits = dense(hidden, f"output_{level}")
    assert_allclose(per_level[level], logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)), atol=1e-5)
  assert per_level.shape == (LEVELS, 3, CODES)
  assert_allclose(np.exp(per_level).sum(axis=-1), np.ones((LEVELS, 3)), rtol=1e-5)
  ids = np.asarray(catalogue.semantic_ids)
  expected = np.array([[sum(per_level[level, b, ids[i, level]] for level in range(LEVELS)) for i in range(ITEMS)]
                       for b in range(3)])  # fmt: skip
  assert_allclose(call(PARALLEL, "scores", parallel_params, catalogue, queries), expected, atol=1e-5)
  every = jnp.tile(jnp.arange(ITEMS), (3, 1))
  assert_allclose(call(PARALLEL, "log_probs", parallel_params, catalogue, queries, every), expected, atol=1e-5)


def test_the_loss_of_the_parallel_head_is_minus_its_log_probabilities(parallel_params, catalogue, batch):
  every = jnp.asarray(states(parallel_params, catalogue, batch, settings=PARALLEL).reshape(-1, WIDTH))
  targets = batch["targets"].reshape(-1, 1)
  expected = call(PARALLEL, "log_probs", parallel_params, catalogue, every, targets)[:, 0]
  (value, terms), gradient = loss_and_gradient(PARALLEL, parallel_params, catalogue, batch)
  real = SEGMENTS.reshape(-1) > 0
  assert_allclose(value, -np.asarray(expected, np.float64)[real].mean(), rtol=1e-5)
  assert {f"nll_level_{level + 1}" for level in range(LEVELS)} <= set(terms)
  assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@functools.partial(jax.jit, static_argnames=("settings", "width"))
def search(settings, params, catalogue, queries, exclude=None, *, width, seen=None):
  return Recommender(settings).apply(
    {"params": params}, catalogue, queries, width=width, exclude=exclude, seen=seen, method="search"
  )


def test_an_exact_head_finds_the_best_items_that_are_not_excluded(parallel_params, dense_params, catalogue, queries):
  for settings, own in ((PARALLEL, parallel_params), (DENSE, dense_params)):
    scores = np.asarray(call(settings, "scores", own, catalogue, queries), np.float64)
    log_probs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    order = np.argsort(-scores, axis=1)
    exclude = np.concatenate([order[:, :2], np.full((3, 1), -1)], axis=1)
    found = search(settings, own, catalogue, queries, jnp.asarray(exclude), width=ITEMS + 2)
    assert_array_equal(found.items, np.pad(order[:, 2:], ((0, 0), (0, 4)), constant_values=-1))
    left = np.take_along_axis(log_probs, order[:, 2:], axis=1)
    assert_allclose(found.log_probs[:, : ITEMS - 2], left, atol=1e-4)
    assert np.isneginf(found.log_probs[:, ITEMS - 2 :]).all()


@pytest.mark.parametrize(
  ("changes", "reads"),
  [
    ({"head": "generative"}, True), ({"head": "dense"}, True),
    ({"head": "hybrid"}, True), ({"head": "parallel"}, False),
    ({"backbone": "encoder_decoder"}, True), ({"backbone": "encoder_decoder", "head": "parallel"}, False),
  ],
  ids=str,
)  # fmt: skip
def test_heads_that_look_at_the_history_are_told_of_it_where_the_settings_say_so(batch, changes, reads):
  settings = dataclasses.replace(SETTINGS, **changes)
  assert make_recommender(settings).seen(batch) is None
  assert (make_recommender(dataclasses.replace(settings, seen_item_bias=True)).seen(batch) is not None) == reads


def test_a_head_that_does_not_look_at_the_history_needs_none(parallel_params, catalogue, queries):
  settings = dataclasses.replace(PARALLEL, seen_item_bias=True)
  assert_array_equal(
    call(settings, "scores", parallel_params, catalogue, queries),
    call(PARALLEL, "scores", parallel_params, catalogue, queries),
  )


def test_the_documented_custom_head_ranks(dense_params, catalogue, batch, queries, tmp_path, monkeypatch, snippet):
  (tmp_path / "my_heads.py").write_text(snippet("parts.md", "my_heads.py"), encoding="utf-8")
  monkeypatch.syspath_prepend(tmp_path)
  settings = dataclasses.replace(SETTINGS, head="my_heads:NearestHead")
  vectors = numpy_item_vectors(dense_params, catalogue)
  distance = np.square(np.asarray(queries)[:, None] - vectors[None]).sum(axis=-1)
  found = search(settings, dense_params, catalogue, queries, width=3)
  assert_array_equal(found.items, np.argsort(distance, axis=1)[:, :3])
  (value, terms), gradient = loss_and_gradient(settings, dense_params, catalogue, batch)
  assert np.isfinite(value)
  assert terms["nll"] == value
  assert np.any(gradient["item_embedding"])


def test_the_documented_custom_backbone_averages(dense_params, catalogue, batch, tmp_path, monkeypatch, snippet):
  (tmp_path / "my_backbones.py").write_text(snippet("parts.md", "my_backbones.py"), encoding="utf-8")
  monkeypatch.syspath_prepend(tmp_path)
  settings = dataclasses.replace(DENSE, backbone="my_backbones:MeanBackbone")
  vectors = numpy_item_vectors(dense_params, catalogue)[batch["items"]]
  found = states(dense_params, catalogue, batch, settings=settings)
  for row, place in zip(*np.nonzero(SEGMENTS), strict=True):
    history = vectors[row, : place + 1][SEGMENTS[row, : place + 1] == SEGMENTS[row, place]]
    assert_allclose(found[row, place], history.mean(axis=0), atol=1e-5)


BFLOAT16 = dataclasses.replace(SETTINGS, dtype="bfloat16")


@functools.partial(jax.jit, static_argnames=("settings", "method"))
def in_its_type(settings, method, params, catalogue, *args):
  return apply(Recommender(settings), params, method, catalogue, *args)


def test_bfloat16_starts_as_the_plain_backbone_bit_for_bit_and_stays_near_float32(fresh, params, catalogue, batch):
  plain = dataclasses.replace(BFLOAT16, num_streams=0)
  shared = {name: value for name, value in fresh.items() if name != "similarity_tables"}
  expected = in_its_type(plain, "states", shared, catalogue, batch)
  assert expected.dtype == jnp.bfloat16
  assert_array_equal(in_its_type(BFLOAT16, "states", fresh, catalogue, batch), expected)
  assert (in_its_type(BFLOAT16, "states", params, catalogue, batch) != expected).any()
  got = np.asarray(in_its_type(BFLOAT16, "states", params, catalogue, batch), np.float32)
  real = SEGMENTS > 0
  assert np.abs(got - states(params, catalogue, batch))[real].max() < 0.1


@pytest.mark.parametrize("head", ["generative", "dense", "parallel"])
def test_bfloat16_losses_and_gradients_are_float32(random_params, catalogue, batch, head):
  settings = dataclasses.replace(BFLOAT16, head=head, subtree_logits=True)
  own = random_params(Recommender(settings), catalogue, batch)

  def loss(params):
    return apply(Recommender(settings), params, "loss", catalogue, batch, deterministic=True)

  (value, terms), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(own)
  assert {leaf.dtype for leaf in jax.tree.leaves((value, terms, gradient))} == {np.dtype(np.float32)}
  in_float32, _ = loss_and_gradient(dataclasses.replace(settings, dtype="float32"), own, catalogue, batch)
  assert value == pytest.approx(float(in_float32[0]), rel=0.02)
  assert value != in_float32[0]


FEATURES = dataclasses.replace(SETTINGS, feature_width=5)


def test_features_come_into_an_items_vector_by_a_linear_map(random_params, catalogue, batch):
  features = np.random.default_rng(8).normal(size=(ITEMS, 5)).astype(np.float32)
  richer = catalogue.replace(features=jnp.asarray(features))
  own = random_params(Recommender(FEATURES), richer, batch)
  plain = {name: value for name, value in own.items() if name != "feature_map"}
  expected = np.asarray(call(SETTINGS, "item_vectors", plain, catalogue)) + features @ own["feature_map"]
  assert_allclose(call(FEATURES, "item_vectors", own, richer), expected, atol=1e-5)
  assert_allclose(call(FEATURES, "item_vectors", own, richer, batch["items"]), expected[batch["items"]], atol=1e-5)


@pytest.fixture(scope="module")
def extended(catalogue):
  """The catalogue with three items more, at its end."""
  ids = np.asarray(catalogue.semantic_ids)
  free = np.stack(np.unravel_index(np.arange(CODES**LEVELS), (CODES,) * LEVELS), axis=1)
  free = free[~(free[:, None] == ids[None]).all(-1).any(1)][:3]
  every = np.concatenate([ids, free])
  columns = np.concatenate([catalogue.columns, np.tile(catalogue.columns[:1], (3, 1))])
  columns[ITEMS:, :LEVELS] = code_columns([free], [np.ones(3, bool)], num_codes=CODES)
  return Catalogue(
    semantic_ids=jnp.asarray(every, jnp.int32),
    columns=jnp.asarray(columns),
    streams=jnp.concatenate([catalogue.streams, catalogue.streams[:3]]),
    edges=catalogue.edges,
    trie=build_trie(every),
  )


def test_items_that_come_later_have_the_mean_prior_of_the_known_ones(extended):
  prior = np.random.default_rng(5).normal(1.0, size=ITEMS).astype(np.float32)
  vectors = jnp.asarray(np.random.default_rng(6).normal(size=(ITEMS + 3, WIDTH)), jnp.float32)
  items = Items(extended, lambda: vectors)
  tables = SubtreeLogits(ITEMS).apply({"params": {"prior": prior}}, items)
  known = np.append(prior, np.full(3, prior.mean()))
  assert_allclose(tables.masses[-1], known[extended.trie.items], rtol=1e-6)
  as_if_known = SubtreeLogits(ITEMS + 3).apply({"params": {"prior": known}}, items)
  jax.tree.map(functools.partial(assert_allclose, rtol=1e-5, atol=1e-6), tables, as_if_known)


@pytest.mark.parametrize("head", ["generative", "dense", "parallel"])
def test_items_that_come_later_are_found_and_known_ones_keep_their_vectors(
  random_params, catalogue, extended, batch, head
):
  columns = np.asarray(extended.columns)
  settings = dataclasses.replace(SETTINGS, head=head, subtree_logits=True)
  own = random_params(Recommender(settings), catalogue, batch)
  vectors = np.asarray(call(settings, "item_vectors", own, extended))
  assert_array_equal(vectors[:ITEMS], call(settings, "item_vectors", own, catalogue))
  codes = np.where(columns[ITEMS:, :, None] < 0, 0, own["code_embedding"][columns[ITEMS:]])
  assert_allclose(vectors[ITEMS:], codes.sum(axis=1), atol=1e-5)
  queries = jnp.asarray(np.random.default_rng(4).normal(size=(3, WIDTH)), jnp.float32)
  found = search(settings, own, extended, queries, width=ITEMS + 3)
  assert_array_equal(np.sort(found.items, axis=1), np.tile(np.arange(ITEMS + 3), (3, 1)))


@pytest.mark.parametrize("changes", [{"head": "dense"}, {"backbone": "encoder_decoder"}], ids=str)
def test_dropped_items_are_known_by_what_else_they_are(random_params, catalogue, batch, changes):
  settings = dataclasses.replace(SETTINGS, dropout=0.0, item_dropout=0.4, subtree_logits=True, head_width=4, **changes)
  if settings.backbone == "encoder_decoder":
    batch = batch | {"targets": batch["targets"][:, 0]}
  params = random_params(Recommender(settings), catalogue, batch)
  apply = functools.partial(Recommender(settings).apply, method="loss")

  @jax.jit
  def step(params, key):
    def loss(params):
      return apply({"params": params}, catalogue, batch, deterministic=False, rngs={"dropout": key})[0]

    return jax.value_and_grad(loss)(params)

  @jax.jit
  def whole(params):
    return apply({"params": params}, catalogue, batch, deterministic=True)[0]

  dropped = []
  for seed in range(20):
    value, gradient = step(params, jax.random.key(seed))
    # Every item competes, so that each that is not dropped has a gradient.
    gone = np.all(np.asarray(gradient["item_embedding"]) == 0, axis=1)
    without = params | {"item_embedding": np.where(gone[:, None], 0, params["item_embedding"])}
    assert_allclose(value, whole(without), rtol=1e-5)
    dropped.append(gone)
  assert abs(np.mean(dropped) - 0.4) < 4 * np.sqrt(0.4 * 0.6 / (20 * ITEMS))
  assert np.std(dropped, axis=0).min() > 0, "each item is now dropped, now not"
