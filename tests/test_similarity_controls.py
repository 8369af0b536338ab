"""The parts of candidate similarity: what each variant of the tables leaves out, and which runs have none."""

import types

import numpy as np
import pytest

from bbqrec_jax.config import default_config
from bbqrec_jax.errors import InputError
from bbqrec_jax.recommender.signals import network_shapes


@pytest.fixture
def script(load_file):
  return load_file("experiments/similarity_controls.py")


def test_a_variant_leaves_out_what_it_says_and_the_run_s_own_tables_stay(script):
  rng = np.random.default_rng(0)
  tables = {"scale": np.array([0.4]), "tables": rng.normal(size=(2, 3, 6)), "neighbour_table": rng.normal(size=(3, 4))}
  tables |= {name: rng.normal(size=shape) for name, shape in network_shapes(2).items()}
  before = {name: part.copy() for name, part in tables.items()}
  found = dict(script.variants(tables, ["features of text", "fused"]))
  assert list(found) == ["the run's own", "without the network", "without features of text", "without fused",
                         "without behaviour", "the last item alone"]  # fmt: skip
  for name in [*found][1:]:
    assert not any(np.any(found[name][part]) for part in network_shapes(2))
  np.testing.assert_array_equal(found["without the network"]["tables"], before["tables"])
  for name, part in before.items():
    np.testing.assert_array_equal(tables[name], part)
    np.testing.assert_array_equal(found["the run's own"][name], part)
  for index, name in enumerate(("features of text", "fused")):
    own = found[f"without {name}"]
    assert not np.any(own["tables"][index])
    np.testing.assert_array_equal(own["tables"][1 - index], before["tables"][1 - index])
    np.testing.assert_array_equal(own["neighbour_table"], before["neighbour_table"])
  assert not np.any(found["without behaviour"]["neighbour_table"])
  np.testing.assert_array_equal(found["without behaviour"]["tables"], before["tables"])
  last = found["the last item alone"]
  np.testing.assert_array_equal(last["tables"][:, 0], before["tables"][:, 0])
  np.testing.assert_array_equal(last["neighbour_table"][0], before["neighbour_table"][0])
  assert not np.any(last["tables"][:, 1:])
  assert not np.any(last["neighbour_table"][1:])
  assert all(part["scale"] == 0.4 for part in found.values())


def test_popularity_is_in_buckets_of_equally_many_interactions_and_is_added_by_them(script):
  counts = np.array([0, 40, 10, 10, 20, 0, 20])
  buckets = script.popularity_buckets(counts, 4)
  sums = [counts[buckets == bucket].sum() for bucket in range(4)]
  assert sums == [20, 20, 20, 40]
  assert buckets[1] == 3
  assert buckets[0] == buckets[5] == 0
  table = np.arange(8.0).reshape(2, 4)
  recent = np.array([[3, -1, -1], [2, 4, 1]])
  added = script.of_popularity(table, buckets, recent, np.array([[1, 0], [4, 6]]))
  np.testing.assert_array_equal(added, [[table[0, 3], table[0, 0]], [table[1, buckets[4]], table[1, buckets[6]]]])


def test_a_run_without_candidate_similarity_is_refused(script):
  with pytest.raises(InputError, match="expected a run with candidate similarity"):
    script.report(types.SimpleNamespace(config=default_config()))
