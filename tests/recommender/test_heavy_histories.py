"""Users as no other is among ordinary ones: what is made of the others stays the same."""

import numpy as np
import pytest

from bbqrec_jax.data import interactions, ranking
from bbqrec_jax.data.interactions import leave_one_out
from bbqrec_jax.data.packing import packed_epoch, prefix_epoch

ITEMS, USERS, MANY = 300, 30, 5000


@pytest.fixture(scope="module")
def scale(load_file):
  return load_file("experiments/benchmark_scale.py")


@pytest.fixture
def splits(scale, monkeypatch):
  """Ordinary users alone, with others, and which of these are the ordinary ones; blocks and groups are small."""
  monkeypatch.setattr(ranking, "_ORDINARY", 64)
  monkeypatch.setattr(interactions, "_BLOCK", 64)
  alone, together = (scale.made_histories(users=USERS, items=ITEMS, interactions=count) for count in (0, MANY))
  return leave_one_out(alone), leave_one_out(together), np.flatnonzero(together.lengths == 5)


def test_the_others_are_as_no_user_should_have_to_be_to_be_served(scale):
  lengths = scale.made_histories(users=USERS, items=ITEMS, interactions=MANY).lengths
  assert sorted(lengths[lengths != 5].tolist()) == [3, ITEMS, 1000, MANY]


def test_others_change_no_rank_of_ordinary_users(scale, splits):
  alone, together, ordinary = splits
  paths = scale.history_paths(items=ITEMS, heads=["dense"], batch_size=8, max_length=6)
  rank, answer = paths.pop("dense: evaluation with and without the history"), paths.pop("dense: recommend")
  both, own = rank(together), rank(alone)
  np.testing.assert_array_equal(both.ranks[ordinary], own.ranks)
  np.testing.assert_array_equal(both.without_history.ranks[ordinary], own.without_history.ranks)
  answers, histories = answer(together), together.history("test")
  for place, (_, items, _) in zip(ordinary, answer(alone), strict=True):
    assert answers[place][1].tolist() == items.tolist()
  for user in np.flatnonzero(histories.lengths > 100):
    assert set(answers[user][1].tolist()).isdisjoint(histories.history(user).tolist())
  (everything,) = np.flatnonzero(histories.lengths == ITEMS - 1)
  assert answers[everything][1].tolist() == [together.test_target[everything]], "it is all that is left"
  for path in paths.values():
    assert len(path(together))


@pytest.mark.parametrize("make", [packed_epoch, prefix_epoch])
def test_rows_of_an_epoch_are_made_in_any_pieces(splits, make):
  options = {"row_length": 12, "whole": False} if make is packed_epoch else {}
  rows = make(splits[1].train, max_length=6, seed=0, epoch=1, **options)
  every = rows.make(0, rows.num_rows + 3)
  assert all(len(grid) == rows.num_rows + 3 and not grid[rows.num_rows :].any() for grid in every.values())
  for first, last in ((0, 1), (7, 20), (rows.num_rows - 1, rows.num_rows + 2), (rows.num_rows + 1, rows.num_rows + 3)):
    for name, grid in rows.make(first, last).items():
      np.testing.assert_array_equal(grid, every[name][first:last])
