"""Steps on many devices are steps on one device: losses, metrics, gradients and parameters.

    TEST_DEVICES=8 pytest tests/test_parallel.py

tries eight devices too; four are what tests have otherwise.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bbqrec_jax.config import default_config
from bbqrec_jax.data.feature_store import FeatureStore
from bbqrec_jax.data.interactions import from_lengths
from bbqrec_jax.data.pipeline import CatalogueSample, PackedHistories, tokenizer_batches
from bbqrec_jax.errors import InputError
from bbqrec_jax.recommender.catalogue import Catalogue, code_columns
from bbqrec_jax.recommender.evaluate import make_ranker
from bbqrec_jax.recommender.model import Recommender
from bbqrec_jax.recommender.settings import RecommenderSettings
from bbqrec_jax.recommender.step import RecommenderState, make_recommender_step
from bbqrec_jax.semantic_ids.trie import build_trie
from bbqrec_jax.tokenizer import step as steps_of_tokenizer
from bbqrec_jax.tokenizer.club import ClubNetwork, Disentangling
from bbqrec_jax.tokenizer.model import Tokenizer
from bbqrec_jax.tokenizer.settings import LossWeights, TokenizerSettings
from bbqrec_jax.tokenizer.state import TokenizerState, even_usage
from bbqrec_jax.tokenizer.step import CodebookUpkeep, make_tokenizer_step
from bbqrec_jax.training.checkpointing import Checkpointer
from bbqrec_jax.training.partitioning import MeshJit, Pmap, SingleDevice, make_partitioner
from bbqrec_jax.training.state import TrainState, step_key
from bbqrec_jax.training.step import in_turn, side_by_side

# No number of devices divides the items: rows of tables are filled up where they are spread.
NUM_ITEMS, LEVELS, CODES = 41, 3, 4
STEPS = 20


# Both sides compute the same sums of float32 numbers in another order: four partial sums against one. With plain SGD a
# parameter differs by what its gradient does; Adam would divide by it and blow up the rounding of small gradients.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}
# What is left of that after twenty steps, each on the parameters of the one before.
CLOSE_IN_THE_END = {"rtol": 1e-4, "atol": 2e-5}

PARTITIONERS = {
  "single": lambda count: SingleDevice(),
  "pmap": lambda count: Pmap(devices=jax.devices()[:count]),
  "mesh": lambda count: MeshJit(devices=jax.devices()[:count]),
  # Tables of items and of codes, what the optimiser keeps of them, and all that the catalogue says of items.
  "sharded": lambda count: MeshJit(devices=jax.devices()[:count], shard_rows=20),
}


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


def make_recommender(head, *, dropout=0.0, **changes):
  settings = RecommenderSettings(
    norm="pre", position_buckets=16,
    num_items=NUM_ITEMS, num_levels=LEVELS, num_codes=CODES, num_columns=2 * LEVELS, head=head, width=8, num_layers=1,
    mlp_width=8, depth_layers=1, dropout=dropout, max_length=8, num_streams=2, cross_streams=True, table_buckets=8,
    **({"subtree_logits": False, "seen_item_bias": False} | changes),
  )  # fmt: skip
  return Recommender(settings)


@functools.cache
def recommender_problem(head, *, accumulation=1, **changes):
  """(first state, step function, shared data, batches); all arrays on the host, where no step can donate them."""
  model, catalogue = make_recommender(head, **changes), make_catalogue()
  histories = PackedHistories(make_histories(), batch_rows=8, max_length=8, row_length=12, whole=False, seed=0)
  batches = list(itertools.islice(histories, STEPS))
  for batch in batches:
    del batch["index"]
  # The last batch of an epoch ends in empty rows: one device has less to learn from than another, here nothing at all.
  for name in batches[1]:
    batches[1][name][6:] = 0
  params = jax.jit(model.init)(jax.random.key(0), catalogue, batches[0])["params"]
  # With a step so small that rounding does not grow from one to the next; it keeps something of each table.
  optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.005, momentum=0.9))
  state = RecommenderState.create(jax.device_get(params), optimizer, seed=0)
  return state, make_recommender_step(model, optimizer, accumulation=accumulation), catalogue, batches


def own_loss(rows):
  return jnp.sum(jnp.square(rows.quantized["fused"]), axis=-1) * (rows.items % 3)


@functools.cache
def tokenizer_problem(*, steps=STEPS, **choices):
  """(first state, step function, shared data, batches); codes are switched on by the second step."""
  num_codes = 16
  rng = np.random.default_rng(2)
  features = {"text": rng.normal(size=(NUM_ITEMS, 9)), "image": rng.normal(size=(NUM_ITEMS, 6))}
  present = {"text": np.ones(NUM_ITEMS, bool), "image": rng.random(NUM_ITEMS) < 0.6}
  histories = PackedHistories(make_histories(), batch_rows=8, max_length=8, row_length=12, whole=True, seed=0)
  iterator = iter(tokenizer_batches(histories, FeatureStore(features, present), CatalogueSample(NUM_ITEMS, 16, seed=0)))
  batches = [next(iterator) for _ in range(steps)]
  iterator.close()
  model = Tokenizer(
    TokenizerSettings(
      modalities=(("text", 9), ("image", 6)), num_items=NUM_ITEMS, code_width=8, num_levels=2, num_codes=num_codes,
      hidden=(16,), max_length=8, dropout=0.0, temperature=0.2, specific_dropout=0.0, level_dropout=0.0,
      warmup_steps=1, own_loss=f"{__name__}:own_loss",
      weights=LossWeights(quantization=0.7, contrast=0.5, modality_contrast=0.3, disentangle=0.2), **choices,
    )
  )  # fmt: skip
  params = jax.jit(model.init)(jax.random.key(0), batches[0])["params"]
  network = ClubNetwork(("text", "image"), 8)
  zeros = {name: np.zeros((1, 8), np.float32) for name in ("text", "image")}
  network_params = jax.device_get(jax.jit(network.init)(jax.random.key(0), zeros)["params"])
  optimizer = optax.sgd(0.1)
  with pytest.MonkeyPatch.context() as patch:  # Few steps: codes go out of use sooner.
    patch.setattr(steps_of_tokenizer, "CodebookUpkeep", functools.partial(CodebookUpkeep, usage_decay=0.5))
    patch.setattr(steps_of_tokenizer, "make_disentangling", lambda _: Disentangling(network, optimizer, steps=2))
    step = make_tokenizer_step(model, optimizer)
  state = TokenizerState.create(
    jax.device_get(params), optimizer, seed=0, usage=jax.device_get(even_usage(model.settings.codebook_shape)),
    club=network_params, club_opt_state=optimizer.init(network_params),
  )  # fmt: skip
  return state, step, None, batches


PROBLEMS = {
  "generative": lambda: recommender_problem("generative", subtree_logits=True, seen_item_bias=True),
  "dense": lambda: recommender_problem("dense", seen_item_bias=True),
  "parts": lambda: recommender_problem("dense", accumulation=2, seen_item_bias=True),
  "many parts": lambda: recommender_problem("dense", accumulation=8, seen_item_bias=True),
  # Dropout and negatives, which the mesh draws as one device does.
  "drawn": lambda: recommender_problem("dense", dropout=0.2, item_dropout=0.3, num_negatives=16),
  # Without revival: which residual a code out of use moves to is a draw of its own.
  "tokenizer": lambda: tokenizer_problem(revival_threshold=0.0),
  "per stream": lambda: tokenizer_problem(revival_threshold=0.0, codebooks="per_stream"),
  "three steps": lambda: tokenizer_problem(revival_threshold=0.0, steps=3),
  "revival": lambda: tokenizer_problem(revival_threshold=0.3, steps=3),
}


@functools.cache
def train(kind, count, name):
  """(the last state, it as it is placed, the parameters before each step and after the last, the metrics of each)."""
  state, step, shared, batches = PROBLEMS[name]()
  partitioner = PARTITIONERS[kind](count)
  assert partitioner.num_devices == count
  compiled, shared = partitioner.compile_step(step), partitioner.place(shared)
  params, metrics = [jax.device_get(state.params)], []
  state = partitioner.place(jax.tree.map(fresh, state))
  for batch in batches:
    state, values = compiled(state, shared, batch)
    params.append(jax.tree.map(np.array, partitioner.fetch(state.params)))
    metrics.append(jax.device_get(values))
  key, state = state.key, state.replace(key=None)
  return partitioner.fetch(state).replace(key=jax.random.key_data(key)), state, params, metrics


def fresh(leaf):
  """A copy that a step may donate."""
  return leaf if isinstance(leaf, np.ndarray) else jnp.copy(leaf)


def assert_trees_close(actual, expected, **tolerance):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(one, other, err_msg=jax.tree_util.keystr(path), **tolerance)


def compare(kind, count, name, *, to=None):
  """Training on some devices with training on one."""
  expected, _, expected_params, expected_metrics = train("single", 1, to or name)
  state, _, params, metrics = train(kind, count, name)
  assert int(state.step) == int(expected.step) == len(metrics) == STEPS
  for step in range(STEPS):
    tolerance = CLOSE if step < 3 else CLOSE_IN_THE_END
    assert metrics[step].keys() >= {"loss", "gradient_norm"}
    # The CLUB bound is a difference of two log-likelihoods of about 10, whose rounding is absolute: a few 1e-7.
    assert_trees_close(metrics[step], expected_metrics[step], **tolerance)
    assert_trees_close(params[step + 1], expected_params[step + 1], **tolerance)
  assert_trees_close(state, expected, **CLOSE_IN_THE_END)
  np.testing.assert_array_equal(state.key, expected.key)
  # The comparison says something only of parameters that move.
  moved = jax.tree.map(lambda before, after: bool(np.any(before != after)), expected_params[0], expected_params[-1])
  still = [jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(moved) if not leaf]
  assert not still


CASES = [
  ("pmap", 4, "generative"),
  ("pmap", 4, "dense"),
  ("pmap", 4, "tokenizer"),
  ("pmap", 4, "per stream"),
  ("mesh", 1, "generative"),
  ("mesh", 4, "tokenizer"),
  ("sharded", 2, "tokenizer"),
  ("sharded", 4, "generative"),
  ("sharded", 4, "drawn"),
]


@pytest.mark.parametrize(("kind", "count", "name"), CASES)
def test_devices_train_as_one(kind, count, name):
  if count > jax.device_count():
    pytest.skip(f"needs {count} devices")
  compare(kind, count, name)


@pytest.mark.parametrize(
  ("kind", "count", "name"), [("single", 1, "dense"), ("single", 1, "revival"), ("pmap", 4, "tokenizer"),
                              ("mesh", 1, "generative"), ("sharded", 4, "drawn")]
)  # fmt: skip
def test_steps_in_one_call_are_the_steps_one_by_one(kind, count, name):
  if count > jax.device_count():
    pytest.skip(f"needs {count} devices")
  _, _, params, metrics = train(kind, count, name)
  state, step, shared, batches = PROBLEMS[name]()
  partitioner, together = PARTITIONERS[kind](count), 3
  taken = side_by_side(list(itertools.islice(batches, together)))
  state = partitioner.place(jax.tree.map(fresh, state))
  state, values = partitioner.compile_step(in_turn(step))(state, partitioner.place(shared), taken)
  assert int(state.step) == together
  expected = jax.tree.map(lambda *leaves: np.stack(leaves), *metrics[:together])
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(values), expected)
  jax.tree.map(np.testing.assert_array_equal, partitioner.fetch(state.params), params[together])


# Eight parts are rows one by one, of which some have nothing to learn from.
@pytest.mark.parametrize(
  ("kind", "count", "name"), [("single", 1, "parts"), ("single", 1, "many parts"), ("pmap", 2, "parts"),
                              ("sharded", 4, "parts")]
)  # fmt: skip
def test_parts_of_a_batch_train_as_the_whole(kind, count, name):
  if count > jax.device_count():
    pytest.skip(f"needs {count} devices")
  compare(kind, count, name, to="dense")


def leaves_of(state):
  return jax.tree_util.tree_leaves_with_path(state.replace(key=None))


@pytest.mark.usefixtures("four_devices")
@pytest.mark.parametrize(
  ("kind", "name"),
  [("pmap", "generative"), ("pmap", "dense"), ("pmap", "tokenizer"), ("pmap", "per stream"), ("pmap", "revival"),
   ("mesh", "tokenizer"), ("sharded", "generative")],
)  # fmt: skip
def test_replicas_agree(kind, name):
  _, state, _, _ = train(kind, 4, name)
  spread = 0
  for path, leaf in leaves_of(state):
    shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
    assert len(shards) == 4, jax.tree_util.keystr(path)
    if not leaf.sharding.is_fully_replicated:
      spread += 1
      continue
    for shard in shards[1:]:
      np.testing.assert_array_equal(shard, shards[0], err_msg=jax.tree_util.keystr(path))
  assert bool(spread) == (kind == "sharded")


@pytest.mark.usefixtures("four_devices")
def test_large_tables_are_spread_with_what_the_optimiser_keeps_of_them():
  natural, state, _, _ = train("sharded", 4, "drawn")
  spread = {}
  for (path, leaf), (_, whole) in zip(leaves_of(state), leaves_of(natural), strict=True):
    if leaf.sharding.is_fully_replicated:
      assert whole.ndim == 0 or len(whole) < 20, jax.tree_util.keystr(path)
      continue
    spread[jax.tree_util.keystr(path)] = len(whole)
    parts = [
      np.asarray(shard.data) for shard in sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start)
    ]
    assert [len(part) for part in parts] == [-(-len(whole) // 4)] * 4
    together = np.concatenate(parts)
    np.testing.assert_array_equal(together[: len(whole)], whole)
    # What fills up is nothing to the optimiser: no gradient, no momentum, no step.
    np.testing.assert_array_equal(together[len(whole) :], 0)
  # Parameters, and the momentum of each.
  tables = {name: rows for name, rows in spread.items() if name.startswith(".params")}
  assert tables == {
    ".params['item_embedding'].values": NUM_ITEMS,
    ".params['code_embedding'].values": 2 * LEVELS * CODES,
  }
  assert len(spread) == 2 * len(tables)
  partitioner = PARTITIONERS["sharded"](4)
  catalogue = partitioner.place(make_catalogue())
  for leaf in (catalogue.semantic_ids, catalogue.columns, catalogue.streams, catalogue.trie.items):
    assert leaf.count == NUM_ITEMS
    assert len(leaf.values.addressable_shards[0].data) == 11


@pytest.mark.usefixtures("four_devices")
@pytest.mark.parametrize("kind", PARTITIONERS)
def test_what_is_placed_can_be_fetched(kind):
  partitioner = PARTITIONERS[kind](1 if kind == "single" else 4)

  def make():
    return {
      "table": jnp.arange(42.0).reshape(21, 2), "flags": jnp.arange(25) % 3 == 0, "few": jnp.arange(3),
      "number": jnp.asarray(7),
    }  # fmt: skip

  host = jax.tree.map(np.array, make())
  for placed in (partitioner.place(host), partitioner.place(make()), partitioner.create(make)):
    fetched = partitioner.fetch(placed)
    assert jax.tree.structure(fetched) == jax.tree.structure(host)
    for name, array in host.items():
      np.testing.assert_array_equal(fetched[name], array)
      assert fetched[name].dtype == array.dtype
  # A step gives away what is placed, and not what it was placed from.
  step = partitioner.compile_step(lambda state, shared, batch, *, axis_name: (jax.tree.map(jnp.negative, state), {}))
  given = {"table": host["table"]}
  placed = partitioner.place(given)
  after, _ = step(placed, None, np.zeros(4))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(placed))
  np.testing.assert_array_equal(partitioner.fetch(after)["table"], -np.asarray(make()["table"]))
  np.testing.assert_array_equal(given["table"], make()["table"])
  key = jax.random.key(5)
  placed = partitioner.place({"key": key})["key"]
  assert jnp.issubdtype(placed.dtype, jax.dtypes.prng_key)
  np.testing.assert_array_equal(jax.random.key_data(placed), jax.random.key_data(key))


@pytest.mark.usefixtures("four_devices")
def test_a_checkpoint_does_not_depend_on_the_devices(tmp_path):
  def make(value):
    rows = np.arange(1.0, 22.0, dtype=np.float32)
    params = {"table": value * rows, "few": value * rows[:3]}
    return TrainState.create(params, optax.sgd(0.1, momentum=0.9), seed=int(value))

  data = iter(PackedHistories(make_histories(), batch_rows=8, max_length=8, row_length=12, whole=True, seed=0))
  next(data)
  state = make(3.0)
  saving, place = Checkpointer(tmp_path, strict=False), PARTITIONERS["sharded"](4)
  saving.save(1, place.to_checkpoint(place.place(state)), data, {"best_step": 1})
  saving.close()
  others = [(kind, count) for kind in ("mesh", "pmap", "sharded") for count in (2, 4)]
  for kind, count in [("single", 1), *others, ("sharded", 1)]:
    partitioner, again = PARTITIONERS[kind](count), Checkpointer(tmp_path, strict=False)
    like, fresh_data = partitioner.place(make(0.0)), iter(data._dataset)
    saved, progress = again.restore_latest(partitioner.to_checkpoint(like), fresh_data)
    again.close()
    restored = partitioner.from_checkpoint(saved, like)
    assert jax.tree.structure(restored) == jax.tree.structure(like)
    for leaf, other in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
      assert leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim)
    assert_trees_close(partitioner.fetch(restored.params), state.params, rtol=0)
    assert_trees_close(partitioner.fetch(restored.opt_state), jax.device_get(state.opt_state), rtol=0)
    np.testing.assert_array_equal(jax.random.key_data(restored.key), jax.random.key_data(state.key))
    assert progress == {"best_step": 1}
    assert fresh_data.get_state() == data.get_state()


@pytest.mark.usefixtures("four_devices")
def test_revival_moves_codes_out_of_use_alone():
  # Codes came into use with the second of three steps. One that nothing chose since is at a quarter of its even share.
  kept, _, kept_params, _ = train("pmap", 4, "three steps")
  revived, _, revived_params, _ = train("pmap", 4, "revival")
  dead = np.asarray(kept.usage) < 0.3 / kept.usage.shape[-1]
  assert 0 < dead.sum() < dead.size
  np.testing.assert_allclose(revived.usage, np.where(dead, 1 / 16, kept.usage), rtol=1e-6)
  # Two programs: what did not move is alike within rounding.
  change = np.abs(kept_params[-1]["codebooks"] - revived_params[-1]["codebooks"])
  moved = np.any(change > 1e-4, axis=-1)
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

  partitioner = PARTITIONERS["pmap"](4)
  compiled, shared = partitioner.compile_step(loss_of_each_device), partitioner.place(catalogue)
  # All four devices are given one and the same row.
  batch = jax.tree.map(lambda leaf: np.repeat(leaf, 4, axis=0), row)

  def losses(step):
    started = partitioner.place(jax.tree.map(fresh, state.replace(step=np.array(step, np.int32))))
    return np.asarray(compiled(started, shared, batch)[1]["loss"])

  first, again, later = losses(0), losses(0), losses(1)
  np.testing.assert_array_equal(first, again)
  assert len(set(first.tolist() + later.tolist())) == 8


@pytest.mark.usefixtures("four_devices")
@pytest.mark.parametrize("kind", ["single", "pmap", "sharded"])
def test_what_is_made_once_is_what_jit_makes(kind):
  """The compiler is told to do less for it, and no bit may change."""

  def function():
    first, second = jax.random.split(jax.random.key(3))
    return {"table": jax.nn.initializers.lecun_normal()(first, (41, 7)), "other": jax.random.normal(second, (5, 3))}

  before = jax.config.values["jax_disable_most_optimizations"]
  jax.config.update("jax_disable_most_optimizations", False)
  try:
    partitioner = PARTITIONERS[kind](4)
    made, expected = partitioner.fetch(partitioner.create(function)), jax.jit(function)()
  finally:
    jax.config.update("jax_disable_most_optimizations", before)
  jax.tree.map(np.testing.assert_array_equal, made, jax.device_get(expected))


@pytest.mark.usefixtures("four_devices")
@pytest.mark.parametrize("kind", ["pmap", "sharded"])
def test_a_batch_that_does_not_divide_is_refused(kind):
  state, step, shared, batches = recommender_problem("dense")
  batch = {name: grid[:6] for name, grid in batches[0].items()}
  with pytest.raises(InputError, match="a batch of 6 rows cannot be spread over 4 devices: use a multiple"):
    PARTITIONERS[kind](4).compile_step(step)(state, shared, batch)


@pytest.mark.usefixtures("four_devices")
@pytest.mark.parametrize("head", ["dense", "generative"])
def test_compile_map_equals_jit(head):
  state, _, catalogue, _ = recommender_problem(head)
  rng = np.random.default_rng(0)
  rows = 7  # Which no number of devices divides.
  lengths = rng.integers(1, 9, (rows, 1))
  real = np.arange(8) < lengths
  batch = {
    "items": np.where(real, rng.integers(0, NUM_ITEMS, (rows, 8)), 0).astype(np.int32),
    "segments": real.astype(np.int32),
    "positions": np.where(real, np.arange(8), 0).astype(np.int32),
    "targets": rng.integers(0, NUM_ITEMS, rows).astype(np.int32),
  }
  # Parameters far from their small first values, so that no two items tie within rounding.
  params = jax.tree.map(lambda leaf: leaf + rng.normal(scale=0.3, size=leaf.shape).astype(np.float32), state.params)
  ranker = make_ranker(make_recommender(head), beam_width=NUM_ITEMS)
  expected = jax.jit(ranker)(params, catalogue, batch)
  assert len(np.unique(expected["ranks"])) > 2
  for kind, count in (("single", 1), ("pmap", 4), ("mesh", 2), ("sharded", 4)):
    partitioner = PARTITIONERS[kind](count)
    compiled = partitioner.compile_map(ranker)
    for result in (compiled(partitioner.place(params), partitioner.place(catalogue), batch) for _ in range(2)):
      assert result.keys() == {"ranks", "top"}
      np.testing.assert_array_equal(result["ranks"], expected["ranks"])
      np.testing.assert_array_equal(result["top"], expected["top"])


def test_partitioners_of_a_config():
  config = default_config()
  for name, kind in (("single", SingleDevice), ("pmap", Pmap), ("mesh", MeshJit)):
    config.partitioner = name
    partitioner = make_partitioner(config)
    assert isinstance(partitioner, kind)
    assert partitioner.num_devices == (1 if name == "single" else jax.device_count())
  config.shard_rows = 500
  assert make_partitioner(config).shard_rows == 500
