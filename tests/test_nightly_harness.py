"""What `experiments/nightly.py` takes for yesterday's data."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal


@pytest.fixture(scope="module")
def nightly(load_file):
  return load_file("experiments/nightly.py")


def test_yesterday_lacks_the_last_of_each_user_that_keeps_three(nightly):
  offsets = np.array([0, 3, 7, 12])
  kept = nightly.in_yesterday(offsets, np.zeros(12, np.int64), new_users=0.0, new_items=0.0, seed=0)
  assert_array_equal(kept, [True] * 3 + [True] * 3 + [False] + [True] * 4 + [False])


def test_new_users_and_items_are_there_today_alone(nightly):
  offsets, items = np.arange(0, 4001, 4), np.random.default_rng(0).integers(100, size=4000)
  users = nightly.in_yesterday(offsets, items, new_users=0.25, new_items=0.0, seed=1).reshape(-1, 4)
  assert {tuple(row) for row in users.tolist()} == {(True, True, True, False), (False,) * 4}
  assert 0.15 < np.mean(~users[:, 0]) < 0.35
  both = nightly.in_yesterday(offsets, items, new_users=0.25, new_items=0.3, seed=1)
  new = np.setdiff1d(items, items[both])
  assert 15 < len(new) < 45
  assert_array_equal(both, users.ravel() & ~np.isin(items, new))
