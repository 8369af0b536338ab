"""What the recommender is trained on, and that it is as its config says."""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bbqrec_jax.config import default_config
from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.interactions import from_lengths, leave_one_out
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.recommender import train as recommender_stage
from bbqrec_jax.recommender.catalogue import Catalogue
from bbqrec_jax.recommender.schedule import batch_rows, bucket_bounds, training_plan
from bbqrec_jax.recommender.settings import RecommenderSettings
from bbqrec_jax.recommender.step import RecommenderState, make_recommender_step
from bbqrec_jax.recommender.train import run_recommender
from bbqrec_jax.recommender.two_towers import make_recommender
from bbqrec_jax.training.settings import Safeguards

ITEMS = 30  # Of `ids`.


@pytest.fixture(scope="module")
def split():
  """Of 60 users with 3 to 14 interactions."""
  rng = np.random.default_rng(4)
  lengths = rng.integers(3, 15, 60)
  return leave_one_out(from_lengths(rng.integers(ITEMS, size=lengths.sum()), lengths, np.arange(60).astype(str)))


class Enough(Exception):
  """What the stage below comes to instead of training."""


@pytest.fixture
def prepare(ids, monkeypatch, tmp_path):
  """A function (split, config) -> plan, catalogue and batches that `run_recommender` would train by."""

  def run(split, config):
    def fit(plan, state, catalogue, step, batches, **options):
      raise Enough(plan, catalogue, batches)

    monkeypatch.setattr(recommender_stage, "fit", fit)
    anywhere = types.SimpleNamespace(
      compile_map=lambda function: function,
      compile_step=lambda function: function,
      place=lambda tree: tree,
      create=lambda function: None,
      num_devices=1,
    )
    dataset = Dataset(
      "of a test", "", split.train, {}, {"text": np.ones(ITEMS, bool)}, ItemIds.numbered(ITEMS), ("",) * ITEMS
    )
    with pytest.raises(Enough) as stopped:
      run_recommender(config, ids, split, dataset, workdir=tmp_path, partitioner=anywhere, log=None)
    return stopped.value.args

  return run


@pytest.mark.parametrize("backbone", ["causal", "encoder_decoder"])
def test_held_out_items_are_in_no_training_batch_and_move_no_bucket(prepare, split, backbone):
  config = default_config()
  config.update_from_flattened_dict({
    "recommender.backbone": backbone, "recommender.batch_rows": 8, "recommender.num_buckets": 8,
  })  # fmt: skip

  def trained_by(split):
    """Bucket edges, and two epochs' batches at the least."""
    _, catalogue, batches = prepare(split, config)
    return [np.asarray(catalogue.edges)] + [
      batch[name] for batch in itertools.islice(batches, 120) for name in sorted(batch)
    ]

  def alike(one, two):
    return [np.array_equal(a, b) for a, b in zip(one, two, strict=True)]

  expected = trained_by(split)
  held_out = dataclasses.replace(
    split, validation_target=(split.validation_target + 1) % ITEMS, test_target=(split.test_target + 1) % ITEMS
  )
  assert (held_out.history("test").items != split.history("test").items).any()
  assert all(alike(trained_by(held_out), expected))
  # Other training items show in both.
  train = dataclasses.replace(split.train, items=(split.train.items + split.train.items % 2) % ITEMS)
  same = alike(trained_by(dataclasses.replace(split, train=train)), expected)
  assert not same[0]
  assert not all(same[1:])


def test_training_is_planned_and_guarded_as_the_config_says(prepare, split):
  config = default_config()
  config.update_from_flattened_dict({
    "log_every": 7, "keep_checkpoints": 5, "on_nonfinite": "skip", "max_skipped": 4, "spike_factor": 9.0,
    "recommender.steps": 33, "recommender.evaluate_every": 11, "recommender.patience": 3,
  })  # fmt: skip
  plan, _, _ = prepare(split, config)
  assert (plan.name, plan.steps, plan.log_every, plan.evaluate_every) == ("recommender", 33, 7, 11)
  assert (plan.select, plan.patience) == ("ndcg@10", 3)
  assert plan.safeguards == Safeguards(keep_checkpoints=5, on_nonfinite="skip", max_skipped=4, spike_factor=9.0)


@pytest.mark.parametrize(
  ("changes", "steps", "every"),
  [
    ({}, 100 * 12, 200),  # 90 transitions in batches of 8: 12 a pass; validations no nearer than 200 steps.
    ({"epochs": 3, "batch_rows": 1}, 270, 200),
    ({"batch_rows": 1, "evaluate_every": 7}, 9000, 7),
    ({"steps": 5}, 5, 200),
    ({"rows": "packed", "row_length": 30, "batch_rows": 2}, 200, 200),
  ],
)
def test_durations_follow_from_the_number_of_transitions(changes, steps, every):
  recommender = default_config().recommender
  recommender.update({"batch_rows": 8, "rows": "histories"} | changes)
  histories = from_lengths(np.zeros(100, int), np.full(10, 10), np.arange(10).astype(str))
  assert training_plan(recommender, histories) == (steps, every)


@pytest.mark.parametrize(
  ("transitions", "changes", "rows"),
  [
    (300, {}, 8), (51_199, {}, 8), (51_200, {}, 16), (102_399, {}, 16), (102_400, {}, 32), (10**7, {}, 32),
    (10**7, {"max_length": 50}, 20), (10**7, {"row_length": 64}, 16), (10**7, {"max_length": 2000}, 1),
    (10**7, {"rows": "histories"}, 256), (300, {"backbone": "encoder_decoder"}, 256), (10**7, {"batch_rows": 3}, 3),
  ],
)  # fmt: skip
def test_a_batch_follows_from_the_number_of_transitions(transitions, changes, rows):
  recommender = default_config().recommender
  recommender.update(changes)
  histories = from_lengths(np.zeros(transitions + 2, int), np.array([transitions + 1, 1]), np.array(["a", "b"]))
  assert batch_rows(recommender, histories) == rows


def test_what_ranks_is_the_moving_average_of_what_is_trained(random_params):
  settings = RecommenderSettings(
    num_items=9, head="dense", width=4, num_layers=1, mlp_width=4, average=0.75, rows="histories"
  )
  nothing = jnp.zeros((9, 0), jnp.int32)
  catalogue = Catalogue(nothing, nothing, jnp.zeros((9, 0, 1)), jnp.zeros((0, 31)))
  batch = {"items": np.ones((2, 3), np.int32), "segments": np.ones((2, 3), np.int32), "targets": np.arange(2)}
  batch["positions"] = np.tile(np.arange(3), (2, 1))
  model, optimizer = make_recommender(settings), optax.sgd(0.1)
  params = random_params(model, catalogue, batch)

  def stepped(state):
    return jax.jit(lambda s: make_recommender_step(model, optimizer)(s, catalogue, batch, axis_name=None)[0])(state)

  plain = RecommenderState.create(params, optimizer, seed=0)
  both = RecommenderState.create(params, optimizer, seed=0, trained=params)
  average = params
  for _ in range(2):
    plain, both = stepped(plain), stepped(both)
    average = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, average, plain.params)
    jax.tree.map(np.testing.assert_allclose, both.trained, plain.params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), both.params, average)
  assert plain.trained is None


def test_a_length_bucket_is_kept_where_an_epoch_fills_sixteen_batches():
  rng = np.random.default_rng(0)
  recommender = default_config().recommender
  recommender.update({"batch_rows": 4, "max_length": 12, "length_buckets": (2, 5, 8)})

  def bounds(lengths):
    lengths = np.array(lengths)
    histories = from_lengths(rng.integers(0, 9, lengths.sum()), lengths, np.arange(len(lengths)))
    return bucket_bounds(recommender, histories)

  lengths = rng.integers(0, 9, 60)
  rows = [length for own in lengths for length in range(1, own)]
  assert sum(length <= 2 for length in rows) >= 64 > sum(5 < length <= 8 for length in rows)
  assert sum(2 < length <= 5 for length in rows) >= 64
  assert bounds(lengths) == (2, 5, 9)
  assert bounds([6] * 12) == (7,)  # 24 rows of up to two items, 36 more of up to five.
  assert bounds([6] * 13) == (5, 7)  # These are joined: 65 rows.
  assert bounds([3] * 40) == (2, 4)
  assert bounds([40] * 40) == (2, 5, 8)
  assert bounds([40]) == ()
  recommender.length_buckets = (2, 12, 20)  # Only those below the longest history count.
  assert bounds([40] * 40) == (2,)
  recommender.length_buckets = ()
  assert bounds([6] * 100) == ()
