"""What `experiments/nightly.py` takes for yesterday's data."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal


@pytest.fixture(scope="module")
def nightly(load_file):
  return load_file("experiments/nightly.py")


def test_yesterday_lacks_the_last_of_each_user_that_keeps_three(nightly):
  kept = nightly.in_yesterday(np.array([0, 3, 7, 12]), new_users=0.0, seed=0)
  assert_array_equal(kept, [True] * 3 + [True] * 3 + [False] + [True] * 4 + [False])


def test_new_users_are_all_there_or_not_at_all(nightly):
  offsets = np.arange(0, 4001, 4)
  kept = nightly.in_yesterday(offsets, new_users=0.25, seed=1).reshape(-1, 4)
  assert {tuple(row) for row in kept.tolist()} == {(True, True, True, False), (False,) * 4}
  assert 0.15 < np.mean(~kept[:, 0]) < 0.35
  assert_array_equal(kept.ravel(), nightly.in_yesterday(offsets, new_users=0.25, seed=1))
