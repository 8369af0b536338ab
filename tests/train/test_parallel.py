"""One step on four devices is one step on one device: losses, metrics, gradients and parameters."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bbqrec_jax.data.interactions import from_lengths
from bbqrec_jax.data.pipeline import CatalogueSample, FeatureStore, PackedHistories, tokenizer_batches
from bbqrec_jax.errors import InputError
from bbqrec_jax.evaluation.ranking import make_ranker
from bbqrec_jax.models.catalogue import Catalogue, RecommenderSettings, code_columns
from bbqrec_jax.models.critic import ClubCritic
from bbqrec_jax.models.recommender import Recommender
from bbqrec_jax.models.tokenizer import Tokenizer, TokenizerSettings
from bbqrec_jax.models.tokenizer_loss import LossWeights
from bbqrec_jax.semantic_ids.trie import build_trie
from bbqrec_jax.train.parallel import PARTITIONERS, Pmap, SingleDevice
from bbqrec_jax.train.state import CodebookUse, TrainState, step_key
from bbqrec_jax.train.steps import CodebookUpkeep, Disentangling, make_recommender_step, make_tokenizer_step

NUM_ITEMS, LEVELS, CODES = 40, 3, 4
STEPS = 3


@pytest.fixture
def four_devices():
  if jax.local_device_count() != 4:
    pytest.skip("needs four devices")


# Both sides compute the same sums of float32 numbers in another order: four partial sums against one. With plain SGD a
# parameter differs by what its gradient does; Adam would divide by it and blow up the rounding of small gradients.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def make_histories():
  rng = np.random.default_rng(0)
  lengths = rng.integers(2, 12, 25)
  return from_lengths(rng.integers(0, NUM_ITEMS, lengths.sum()), lengths, np.arange(25).astype(str))


def make_catalogue():
  rng = np.random.default_rng(1)
  identifiers = rng.permutation(CODES**LEVELS)[:NUM_ITEMS]
  codes = np.stack([identifiers // CODES**level % CODES for level in range(LEVELS)], axis=1).astype(np.int32)
  others = rng.integers(0, CODES, (NUM_ITEMS, LEVELS))
  everywhere, somewhere = np.ones(NUM_ITEMS, bool), rng.random(NUM_ITEMS) < 0.8
  vectors = rng.normal(size=(NUM_ITEMS, 2, 5)).astype(np.float32)
  vectors[~somewhere, 1] = 0.0
  return Catalogue(
    semantic_ids=jnp.asarray(codes),
    columns=jnp.asarray(code_columns([codes, others], [everywhere, somewhere], num_codes=CODES)),
    streams=jnp.asarray(vectors),
    edges=jnp.tile(jnp.linspace(-0.8, 0.8, 7), (3, 1)),
    trie=build_trie(codes),
  )


def make_recommender(head, *, dropout=0.0):
  settings = RecommenderSettings(
    num_items=NUM_ITEMS, num_levels=LEVELS, num_codes=CODES, num_columns=2 * LEVELS, head=head, width=8, num_layers=1,
    mlp_width=8, depth_layers=1, dropout=dropout, max_length=8, num_streams=2, num_buckets=8,
  )  # fmt: skip
  return Recommender(settings)


@functools.cache
def recommender_problem(head):
  """(first state, step function, shared data, batches); all arrays on the host, where no step can donate them."""
  model, catalogue = make_recommender(head), make_catalogue()
  histories = PackedHistories(make_histories(), batch_rows=8, max_length=8, row_length=12, whole=False, seed=0)
  batches = list(itertools.islice(histories, STEPS))
  for batch in batches:
    del batch["index"]
  # The last batch of an epoch ends in empty rows: one device has less to learn from than another, here nothing at all.
  for name in batches[1]:
    batches[1][name][6:] = 0
  params = jax.jit(model.init)(jax.random.key(0), catalogue, batches[0])["params"]
  optimizer = optax.sgd(0.1)
  state = TrainState.create(jax.device_get(params), optimizer, seed=0)
  return state, make_recommender_step(model, optimizer), catalogue, batches


@functools.cache
def tokenizer_problem(*, revival_threshold, **choices):
  """(first state, step function, shared data, batches); codes are switched on by the second step."""
  num_codes = 16
  rng = np.random.default_rng(2)
  features = {"text": rng.normal(size=(NUM_ITEMS, 9)), "image": rng.normal(size=(NUM_ITEMS, 6))}
  present = {"text": np.ones(NUM_ITEMS, bool), "image": rng.random(NUM_ITEMS) < 0.6}
  histories = PackedHistories(make_histories(), batch_rows=8, max_length=8, row_length=12, whole=True, seed=0)
  iterator = iter(tokenizer_batches(histories, FeatureStore(features, present), CatalogueSample(NUM_ITEMS, 16, seed=0)))
  batches = [next(iterator) for _ in range(STEPS)]
  iterator.close()
  model = Tokenizer(
    TokenizerSettings(
      modalities=(("text", 9), ("image", 6)), num_items=NUM_ITEMS, code_width=8, num_levels=2, num_codes=num_codes,
      hidden=(16,), max_length=8, dropout=0.0,
      temperature=0.2, specific_dropout=0.0, level_dropout=0.0, **choices,
    )
  )  # fmt: skip
  params = jax.jit(model.init)(jax.random.key(0), batches[0])["params"]
  critic = ClubCritic(("text", "image"), 8)
  zeros = {name: np.zeros((1, 8), np.float32) for name in ("text", "image")}
  critic_params = jax.device_get(jax.jit(critic.init)(jax.random.key(0), zeros)["params"])
  optimizer = optax.sgd(0.1)
  step = make_tokenizer_step(
    model,
    optimizer,
    weights=LossWeights(quantization=0.7, contrast=0.5, modality_contrast=0.3, disentangle=0.2),
    warmup_steps=1,
    upkeep=CodebookUpkeep(model.settings, revival_threshold, usage_decay=0.5),
    disentangling=Disentangling(critic, optimizer, steps=2, full=True),
  )
  use = CodebookUse.create(params["codebooks"], moving_average=model.settings.moving_average)
  state = TrainState.create(jax.device_get(params), optimizer, seed=0, codes=jax.device_get(use))
  state = state.replace(critic=critic_params, critic_opt_state=optimizer.init(critic_params))
  return state, step, None, batches


PROBLEMS = {
  "generative": lambda: recommender_problem("generative"),
  "dense": lambda: recommender_problem("dense"),
  # Without revival: which residual a code out of use moves to is a draw of its own.
  "tokenizer": lambda: tokenizer_problem(revival_threshold=0.0),
  "averages": lambda: tokenizer_problem(
    revival_threshold=0.0, moving_average=True, balanced_last=True, learn_temperature=True, codebooks="per_stream"
  ),
  "revival": lambda: tokenizer_problem(revival_threshold=0.3),
}


@functools.cache
def train(make_partitioner, name):
  """(the last state, the parameters before each step and after the last, the metrics of each step)."""
  state, step, shared, batches = PROBLEMS[name]()
  partitioner = make_partitioner()
  compiled, shared = partitioner.compile_step(step), partitioner.replicate(shared)
  states, metrics = [jax.device_get(state.params)], []
  state = partitioner.replicate(jax.tree.map(fresh, state))
  for batch in batches:
    state, values = compiled(state, shared, batch)
    states.append(jax.tree.map(np.array, state.params))
    metrics.append(jax.device_get(values))
  return state, states, metrics


def fresh(leaf):
  """A copy that a step may donate."""
  return leaf if isinstance(leaf, np.ndarray) else jnp.copy(leaf)


def assert_trees_close(actual, expected, **tolerance):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(one, other, err_msg=jax.tree_util.keystr(path), **tolerance)


@pytest.mark.usefixtures("four_devices")
@pytest.mark.parametrize("name", ["generative", "dense", "tokenizer", "averages"])
def test_four_devices_train_as_one(name):
  single_state, single_params, single_metrics = train(SingleDevice, name)
  state, params, metrics = train(Pmap, name)
  assert int(state.step) == int(single_state.step) == STEPS
  for step in range(STEPS):
    assert metrics[step].keys() >= {"loss", "gradient_norm"}
    # The CLUB bound is a difference of two log-likelihoods of about 10, whose rounding is absolute: a few 1e-7.
    assert_trees_close(metrics[step], single_metrics[step], **CLOSE)
    assert_trees_close(params[step + 1], single_params[step + 1], **CLOSE)
  if name in ("tokenizer", "averages"):
    assert_trees_close(state.critic, single_state.critic, **CLOSE)
    assert_trees_close(state.codes, single_state.codes, **CLOSE)
  np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(single_state.key))
  # The comparison says something only of parameters that move.
  moved = jax.tree.map(lambda before, after: bool(np.any(before != after)), single_params[0], single_params[-1])
  still = [jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(moved) if not leaf]
  assert not still


@pytest.mark.usefixtures("four_devices")
@pytest.mark.parametrize("name", PROBLEMS)
def test_replicas_agree(name):
  state, _, _ = train(Pmap, name)
  for path, leaf in jax.tree_util.tree_leaves_with_path(
    (state.params, state.opt_state, state.critic, state.step, state.codes)
  ):
    shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
    assert len(shards) == 4, jax.tree_util.keystr(path)
    for shard in shards[1:]:
      np.testing.assert_array_equal(shard, shards[0], err_msg=jax.tree_util.keystr(path))


@pytest.mark.usefixtures("four_devices")
def test_revival_moves_codes_out_of_use_alone():
  kept, kept_params, _ = train(Pmap, "tokenizer")
  revived, revived_params, _ = train(Pmap, "revival")
  # Codes came into use with the second of three steps. One that nothing chose since is at a quarter of its even share.
  dead = np.asarray(kept.codes.usage) < 0.3 / kept.codes.usage.shape[-1]
  assert 0 < dead.sum() < dead.size
  np.testing.assert_allclose(revived.codes.usage, np.where(dead, 1 / 16, kept.codes.usage), rtol=1e-6)
  moved = np.any(kept_params[-1]["codebooks"] != revived_params[-1]["codebooks"], axis=-1)
  np.testing.assert_array_equal(moved, dead)


@pytest.mark.usefixtures("four_devices")
def test_dropout_differs_between_devices_and_steps():
  model, catalogue = make_recommender("dense", dropout=0.5), make_catalogue()
  state = recommender_problem("dense")[0]
  rng = np.random.default_rng(0)
  row = {name: rng.integers(0, NUM_ITEMS, (1, 8)).astype(np.int32) for name in ("items", "targets")}
  row |= {"segments": np.ones((1, 8), np.int32), "positions": np.arange(8, dtype=np.int32)[None]}

  def loss_of_each_device(state, shared, batch, *, axis_name):
    loss, _ = model.apply(
      {"params": state.params}, shared, batch, deterministic=False, method="loss",
      rngs={"dropout": step_key(state, axis_name)},
    )  # fmt: skip
    return state, {"loss": jax.lax.all_gather(loss, axis_name)}

  partitioner = Pmap()
  compiled, shared = partitioner.compile_step(loss_of_each_device), partitioner.replicate(catalogue)
  # All four devices are given one and the same row.
  batch = jax.tree.map(lambda leaf: np.repeat(leaf, 4, axis=0), row)

  def losses(step):
    started = partitioner.replicate(jax.tree.map(fresh, state.replace(step=np.array(step, np.int32))))
    return np.asarray(compiled(started, shared, batch)[1]["loss"])

  first, again, later = losses(0), losses(0), losses(1)
  np.testing.assert_array_equal(first, again)
  assert len(set(first.tolist() + later.tolist())) == 8


@pytest.mark.usefixtures("four_devices")
def test_a_batch_that_does_not_divide_is_refused():
  state, step, shared, batches = recommender_problem("dense")
  partitioner = Pmap()
  batch = {name: grid[:6] for name, grid in batches[0].items()}
  with pytest.raises(InputError, match="a batch of 6 rows cannot be spread over 4 devices: use a multiple"):
    partitioner.compile_step(step)(state, shared, batch)
  mapped = partitioner.compile_map(lambda params, shared, rows: rows["items"])
  with pytest.raises(InputError, match="6 rows cannot be spread over 4 devices"):
    mapped(state.params, shared, batch)


@pytest.mark.usefixtures("four_devices")
@pytest.mark.parametrize("head", ["dense", "generative"])
def test_compile_map_equals_jit(head):
  state, _, catalogue, _ = recommender_problem(head)
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 9, (8, 1))
  real = np.arange(8) < lengths
  batch = {
    "items": np.where(real, rng.integers(0, NUM_ITEMS, (8, 8)), 0).astype(np.int32),
    "segments": real.astype(np.int32),
    "positions": np.where(real, np.arange(8), 0).astype(np.int32),
    "targets": rng.integers(0, NUM_ITEMS, 8).astype(np.int32),
  }
  # Parameters far from their small first values, so that no two items tie within rounding.
  params = jax.tree.map(lambda leaf: leaf + rng.normal(scale=0.3, size=leaf.shape).astype(np.float32), state.params)
  ranker = make_ranker(make_recommender(head), beam_width=NUM_ITEMS)
  expected = jax.jit(ranker)(params, catalogue, batch)
  assert len(np.unique(expected["ranks"])) > 2
  for partitioner in (Pmap(), SingleDevice()):
    shared = partitioner.replicate(catalogue)
    result = partitioner.compile_map(ranker)(partitioner.replicate(params), shared, batch)
    assert result.keys() == {"ranks", "top"}
    np.testing.assert_array_equal(result["ranks"], expected["ranks"])
    np.testing.assert_array_equal(result["top"], expected["top"])


def test_partitioners_by_name():
  assert PARTITIONERS["single"]().num_devices == 1
  assert PARTITIONERS["pmap"]().num_devices == jax.device_count()
