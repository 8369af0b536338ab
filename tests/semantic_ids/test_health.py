"""Codebook health against counts by hand, and the words of the table."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from bbqrec_jax.semantic_ids.health import behaviour_cohesion, codebook_health, format_health

BEFORE = np.array([[0, 0], [0, 0], [1, 2], [1, 3]])
AFTER = np.array([[0, 0], [0, 1], [1, 2], [1, 3]])


def test_health_equals_counts_by_hand():
  health = codebook_health(BEFORE, AFTER, num_codes=4)
  assert health["items"] == 4
  assert health["num_codes"] == 4
  assert health["usage"] == [0.5, 0.75]
  assert health["dead"] == [2, 1]
  assert_allclose(health["perplexity"], [2.0, np.exp(0.5 * np.log(2) + 0.5 * np.log(4))])
  assert health["prefix_distinct"] == [0.5, 0.75]
  assert health["collision_rate_before"] == 0.25
  assert health["collision_rate_after"] == 0
  assert health["moved"] == 1


def test_perplexity_is_k_when_all_codes_are_used_alike_and_one_when_one_is():
  codes = np.stack([np.arange(12) % 6, np.full(12, 3)], axis=1)
  health = codebook_health(codes, codes, num_codes=6)
  assert_allclose(health["perplexity"], [6, 1])
  assert health["usage"] == [1.0, pytest.approx(1 / 6)]


def test_the_table_has_a_line_a_level_and_the_collisions():
  lines = format_health(codebook_health(BEFORE, AFTER, num_codes=4)).splitlines()
  assert len(lines) == 4
  assert lines[1].split() == ["1", "2", "=", "50%", "2.0", "2", "50.0%"]
  assert lines[2].split() == ["2", "3", "=", "75%", "2.8", "1", "75.0%"]
  assert lines[3] == "collisions 25.0% before repair, 0.0% after (1 items moved)"


def test_only_a_level_that_uses_under_half_of_its_reachable_codes_is_warned_of():
  codes = np.stack([np.arange(100) % 3, np.arange(100) % 4], axis=1)
  warnings = [line for line in format_health(codebook_health(codes, codes, num_codes=8)).splitlines() if "warn" in line]
  assert warnings == ["warning: level 1 uses 3 of 8 codes: the codebook has collapsed"]


def test_a_catalogue_smaller_than_a_level_is_not_told_to_use_all_codes():
  codes = np.arange(10)[:, None]
  assert "warning" not in format_health(codebook_health(codes, codes, num_codes=256))
  few = np.arange(10)[:, None] % 4
  assert "level 1 uses 4 of 10 codes" in format_health(codebook_health(few, few, num_codes=256))


def test_cohesion_equals_a_loop_over_pairs_and_its_floor_a_loop_over_all_pairings():
  rng = np.random.default_rng(0)
  codes = rng.integers(3, size=(15, 3))
  previous, following = rng.integers(15, size=(2, 25))
  cohesion = behaviour_cohesion(codes, previous, following)
  for level in (1, 2):
    same = [[(codes[i, :level] == codes[j, :level]).all() for j in following] for i in previous]
    assert_allclose(cohesion[f"level{level}"], np.diag(same).mean())
    assert_allclose(cohesion[f"floor{level}"], np.mean(same))
  assert cohesion["level2"] < cohesion["level1"]


def test_cohesion_of_one_level_gives_it_twice():
  codes = np.array([[0], [0], [1]])
  cohesion = behaviour_cohesion(codes, np.array([0, 0, 1, 2]), np.array([1, 2, 0, 2]))
  assert cohesion["level1"] == cohesion["level2"] == 0.75
  assert cohesion["floor1"] == cohesion["floor2"] == 0.5


def test_of_no_pairs_the_cohesion_is_nothing():
  nothing = np.zeros(0, np.int32)
  assert set(behaviour_cohesion(np.array([[0, 1], [1, 1]]), nothing, nothing).values()) == {0.0}


def test_the_table_names_the_cohesion_where_it_is_known():
  health = codebook_health(BEFORE, AFTER, num_codes=4)
  health["cohesion"] = {
    "level1": 0.5, "floor1": 0.25, "level2": 0.125, "floor2": 0.0625, "training1": 0.75, "training2": 0.375,
  }  # fmt: skip
  line = (
    "held-out next items that share the first code: 50.0% (by chance 25.0%, in training 75.0%), the first two: 12.5%"
    " (6.2%, 37.5%)"
  )
  assert line in format_health(health).splitlines()
