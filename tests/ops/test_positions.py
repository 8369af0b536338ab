"""Buckets of relative positions against their rule, one distance at a time."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from bbqrec_jax.ops.positions import elapsed_buckets, relative_buckets


def oracle(distance, num_buckets, max_distance, bidirectional):
  first = 0
  if bidirectional:
    num_buckets //= 2
    first = num_buckets if distance > 0 else 0
    distance = abs(distance)
  else:
    distance = max(-distance, 0)
  exact = num_buckets // 2
  if distance < exact:
    return first + distance
  far = exact + int(math.log(distance / exact) / math.log(max_distance / exact) * (num_buckets - exact))
  return first + min(far, num_buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20)])
def test_buckets_follow_the_rule(num_buckets, max_distance, bidirectional):
  # At an exact power the logarithm may round either way in float32 and float64; those distances are left out.
  exact = num_buckets // (4 if bidirectional else 2)
  steps = num_buckets // (2 if bidirectional else 1) - exact
  edges = {round(exact * (max_distance / exact) ** (k / steps), 6) for k in range(steps + 1)}
  distances = [d for d in range(-200, 201) if abs(d) not in edges or abs(d) == exact]
  got = relative_buckets(
    jnp.array(distances), num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional
  )
  expected = [oracle(d, num_buckets, max_distance, bidirectional) for d in distances]
  assert_array_equal(got, expected)
  assert set(expected) == set(range(num_buckets)) - ({num_buckets // 2} if bidirectional else set()), (
    "the example leaves a bucket untried"
  )


@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_direction_has_two_buckets_at_least_and_one_for_what_is_far(bidirectional):
  directions = 2 if bidirectional else 1
  far = jnp.array([-1000, -16, -1])
  for a_direction in (2, 31):
    found = relative_buckets(far, num_buckets=directions * a_direction, max_distance=16, bidirectional=bidirectional)
    assert_array_equal(found[:2], [a_direction - 1] * 2)
    assert found[2] == 1
  refused = (directions, directions * 32, *((5,) if bidirectional else ()))
  for count in refused:
    with pytest.raises(ValueError, match=f"need 2 to 31 buckets a direction, got {count} for"):
      relative_buckets(far, num_buckets=count, max_distance=16, bidirectional=bidirectional)


def test_every_near_distance_has_a_bucket_of_its_own():
  buckets = np.asarray(relative_buckets(jnp.arange(-7, 8), num_buckets=32))
  assert len(set(buckets.tolist())) == 15


def test_buckets_of_time_are_bit_lengths():
  seconds = [-5, 0, 1, 2, 3, 4, 59, 60, 86399, 2**24 - 1, 2**24 + 1, 2**30, 2**31 - 1]
  expected = [max(value, 0).bit_length() for value in seconds]
  assert expected[-1] == 31, "so 32 buckets tell all apart"
  assert_array_equal(elapsed_buckets(jnp.array(seconds)), expected)
  assert_array_equal(elapsed_buckets(jnp.array(seconds), num_buckets=8), np.minimum(expected, 7))
