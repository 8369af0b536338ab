"""What stays of a log, and in which order, against the plainest way to say it."""

import itertools

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from bbqrec_jax.data.preparation.filters import core, in_order, repeated, without_duplicates


@pytest.fixture(params=range(5))
def log(request):
  rng = np.random.default_rng(request.param)
  n = 120
  return rng.integers(8, size=n), rng.integers(12, size=n), rng.integers(10, size=n).astype(float)


@pytest.mark.parametrize("least", [(1, 1), (3, 1), (3, 9), (18, 12), (5, 100)])
def test_the_core_is_what_one_by_one_removal_leaves(log, least):
  user, item, _ = log
  left = set(range(len(user)))
  while True:
    bad = [
      row
      for row in left
      if sum(user[other] == user[row] for other in left) < least[0]
      or sum(item[other] == item[row] for other in left) < least[1]
    ]
    if not bad:
      break
    left.remove(bad[0])
  keep, _ = core(user, item, per_user=least[0], per_item=least[1])
  assert_array_equal(np.flatnonzero(keep), sorted(left))


@pytest.mark.parametrize("ties", ["file", "item", "shuffle"])
def test_order_is_by_user_time_and_the_rule_for_ties(log, ties):
  user, item, time = log
  rank = -item
  places, tied = in_order(user, time, ties=ties, item_rank=rank, seed=3)
  keys = {"file": np.arange(len(user)), "item": rank, "shuffle": np.zeros(len(user))}[ties]
  expected = sorted(range(len(user)), key=lambda row: (user[row], time[row], keys[row]))
  assert sorted(places.tolist()) == list(range(len(user)))
  if ties == "shuffle":
    assert_array_equal(user[places], user[expected])
    assert_array_equal(time[places], time[expected])
    assert_array_equal(places, in_order(user, time, ties=ties, seed=3).places)
    assert not np.array_equal(places, in_order(user, time, ties=ties, seed=4).places)
  else:
    assert_array_equal(places, expected)
  assert tied == sum((user[a], time[a]) == (user[b], time[b]) for a, b in itertools.pairwise(expected))


def test_without_times_the_file_keeps_its_order():
  assert_array_equal(in_order(np.array([1, 0, 1, 0]), None, ties="file").places, [1, 3, 0, 2])


@pytest.mark.parametrize("rule", ["exact", "first", "last", "consecutive", "keep"])
def test_duplicates_go_by_the_rule(log, rule):
  user, item, time = log
  order = in_order(user, time, ties="file").places
  user, item, time = user[order], item[order], time[order]
  seen, expected = set(), []
  rows = range(len(user)) if rule != "last" else reversed(range(len(user)))
  for row in rows:
    pair = (user[row], item[row])
    key = {"exact": (*pair, time[row]), "keep": row}.get(rule, pair)
    before = row > 0 and pair == (user[row - 1], item[row - 1])
    if not before if rule == "consecutive" else key not in seen:
      expected.append(row)
    seen.add(key)
  assert_array_equal(np.flatnonzero(without_duplicates(user, item, time, rule=rule)), sorted(expected))


def test_without_times_nothing_is_the_very_same(log):
  user, item, _ = log
  assert without_duplicates(user, item, None, rule="exact").all()


def test_pairs_must_come_often_enough(log):
  user, item, _ = log
  pairs = list(zip(user, item, strict=True))
  assert_array_equal(repeated(user, item, least=3), [pairs.count(pair) >= 3 for pair in pairs])
  assert repeated(user, item, least=1).all()
