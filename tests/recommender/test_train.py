"""What the recommender is trained on, and that it is as its config says."""

import dataclasses
import itertools
import types

import numpy as np
import pytest

from bbqrec_jax.config import default_config
from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.interactions import from_lengths, leave_one_out
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.recommender import train as recommender_stage
from bbqrec_jax.recommender.train import run_recommender
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
      compile_map=lambda function: function, place=lambda tree: tree, create=lambda function: None
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
