"""What is held out by time, and what is learned from where nothing is; against the plainest way to say it."""

import dataclasses

import numpy as np
import pytest

from bbqrec_jax.config import default_config, read_config
from bbqrec_jax.data.interactions import from_lengths, leave_one_out, temporal, without_split, without_times
from bbqrec_jax.data.settings import DataSettings, moment
from bbqrec_jax.data.sources import split_of
from bbqrec_jax.errors import InputError


@pytest.fixture
def interactions():
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 9, size=60)
  starts = np.repeat(rng.integers(0, 80, size=60), lengths)
  times = np.concatenate([np.sort(rng.integers(0, 40, size=length)) for length in lengths]) + starts
  return from_lengths(rng.integers(20, size=lengths.sum()), lengths, np.arange(60).astype(str), times.astype(float))


def by_user(histories):
  return {str(user): histories.history(row).tolist() for row, user in enumerate(histories.users)}


def test_nothing_of_training_came_after_the_first_moment(interactions):
  split = temporal(interactions, validation_from=60, test_from=85)
  train, shown, targets = {}, {"validation": {}, "test": {}}, {"validation": {}, "test": {}}
  for row, user in enumerate(interactions.users):
    mine = slice(*interactions.offsets[row : row + 2])
    pairs = list(zip(interactions.times[mine], interactions.items[mine].tolist(), strict=True))
    before, until = ([item for time, item in pairs if time < bound] for bound in (60, 85))
    if not before:
      continue
    train[user] = before
    for stage, known, last in (("validation", before, until), ("test", until, [item for _, item in pairs])):
      if len(last) > len(known):
        shown[stage][user], targets[stage][user] = known, last[len(known)]
  assert by_user(split.train) == train
  for stage in shown:
    assert by_user(split.history(stage)) == shown[stage]
    found = {"validation": split.validation_target, "test": split.test_target}[stage]
    assert dict(zip(split.history(stage).users, found.tolist(), strict=True)) == targets[stage]
    assert len(shown[stage]) > 3
  assert split.train.times.max() < 60
  assert split.history("test").times.max() < 85
  assert split.validation_time.min() >= 60


def test_moments_are_at_eight_and_nine_tenths_where_nobody_says_any(interactions):
  split = temporal(interactions, validation_from=None, test_from=None)
  in_order = np.sort(interactions.times)
  count = len(in_order)
  same = temporal(interactions, validation_from=in_order[count * 8 // 10], test_from=in_order[count * 9 // 10])
  assert split.split_hash == same.split_hash
  assert split.split_hash != temporal(interactions, validation_from=60, test_from=85).split_hash
  assert (
    split.split_hash != leave_one_out(from_lengths(interactions.items, np.full(1, count), np.array(["u"]))).split_hash
  )


def test_without_a_split_everything_is_learned_from(interactions):
  split = without_split(interactions)
  assert split.train is interactions
  several = [row for row, length in enumerate(interactions.lengths) if length > 1]
  whole = [interactions.history(row).tolist() for row in several]
  assert [split.history("test").history(row).tolist() for row in range(len(several))] == [items[:-1] for items in whole]
  assert split.test_target.tolist() == split.validation_target.tolist() == [items[-1] for items in whole]
  assert without_times(split).history("test").times is None


@pytest.mark.parametrize(
  ("given", "says"),
  [
    ({"validation_from": 85.0, "test_from": 60.0}, "before data.test_from"),
    ({"validation_from": -1.0, "test_from": 60.0}, "users to learn from"),
    ({"validation_from": 60.0, "test_from": 1e9}, "users to test on"),
  ],
)
def test_moments_that_leave_a_part_empty_are_refused(interactions, given, says):
  with pytest.raises(InputError, match=says):
    temporal(interactions, **given)


def test_what_cannot_be_split_is_refused(interactions):
  with pytest.raises(InputError, match="times of the interactions"):
    temporal(dataclasses.replace(interactions, times=None), validation_from=None, test_from=None)
  with pytest.raises(InputError, match="two items"):
    without_split(from_lengths(np.arange(3), np.ones(3, int), np.array(["a", "b", "c"])))


def test_the_config_chooses_the_split(interactions):
  settings = dataclasses.replace(
    DataSettings(), split="temporal", validation_from="60", test_from="1970-01-01T00:01:25"
  )
  assert (
    split_of(settings, interactions).split_hash == temporal(interactions, validation_from=60, test_from=85).split_hash
  )
  assert split_of(dataclasses.replace(settings, split="none"), interactions).kind == "none"
  assert moment("2024-03-01", field="x") == moment("2024-03-01T01:00+01:00", field="x") == 1709251200
  config = default_config()
  for field, value, says in (
    ("validation_from", "soon", "validation_from: expected a date"),
    ("test_from", "2024-03-01", "test_from is of data.split = 'temporal'"),
    ("split", "random", "split must be one of"),
    ("source", "csv", "source must be one of synthetic, directory, recbole, memory or tfds:NAME"),
  ):
    wrong = config.copy_and_resolve_references()
    wrong.data[field] = value
    with pytest.raises(InputError, match=says):
      read_config(wrong)
