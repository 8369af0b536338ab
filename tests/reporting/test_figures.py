"""The figures of a report, against what follows by hand."""

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose

from bbqrec_jax.ops.ranking import MISS
from bbqrec_jax.reporting.figures import (
  bucket_centres,
  by_group,
  candidate_curves,
  code_use,
  curves,
  item_map,
  learned_tables,
  plane,
  prefixes,
  similarity_curves,
)


def test_buckets_stand_midway_between_their_edges():
  assert_allclose(bucket_centres(np.array([0.0, 0.2, 0.6])), [-0.1, 0.1, 0.4, 0.8])
  assert_allclose(bucket_centres(np.array([0.3])), [-0.2, 0.8])


def test_each_panel_has_a_line_per_head_with_its_numbers():
  rng = np.random.default_rng(0)
  edges = np.sort(rng.uniform(-1, 1, size=(3, 4)), axis=1)
  tables = rng.normal(size=(3, 2, 7))
  rows, special = similarity_curves(tables, edges, ["text", "image", "text with image"])
  panels = list(dict.fromkeys(row["panel"] for row in rows))
  assert len(panels) == 3
  for panel, own in zip(panels, tables, strict=True):
    for head in range(2):
      line = [row for row in rows if row["panel"] == panel and row["head"] == f"head {head + 1}"]
      assert_allclose([row["bias"] for row in line], own[head, :5])
      (told,) = [row for row in special if row["panel"] == panel and row["head"] == f"head {head + 1}"]
      assert_allclose([told["itself"], told["missing"]], own[head, 5:])


def test_a_continuous_bias_is_a_straight_line():
  rows, _ = similarity_curves(np.array([[[0.5, 0.1, 0.2]]]), np.zeros((1, 0)), ["text"])
  assert [(row["similarity"], row["bias"]) for row in rows] == [(-1.0, -0.5), (1.0, 0.5)]


def test_what_candidates_get_is_counted_from_the_lowest_bucket():
  rng = np.random.default_rng(0)
  tables = {"tables": rng.normal(size=(2, 10, 6)), "neighbour_table": rng.normal(size=(10, 4))}
  rows, special = candidate_curves(tables, ["text", "fused"])
  assert len(rows) == 2 * 4 * 4 + 4 * 5
  for panel, table in zip(("text", "fused"), tables["tables"], strict=True):
    for place, label in ((0, "last item"), (9, "tenth last")):
      line = [row["added"] for row in rows if (row["panel"], row["place"]) == (panel, label)]
      assert_allclose(line, table[place, :4] - table[place, 0])
      (told,) = [row for row in special if (row["panel"], row["place"]) == (panel, label)]
      assert_allclose([told["itself"], told["missing"]], table[place, 4:] - table[place, 0])
  line = [(row["bucket"], row["added"]) for row in rows if (row["panel"], row["place"]) == ("behaviour", "second last")]
  assert_allclose(line, [(-1, 0.0), *enumerate(tables["neighbour_table"][1])])
  few, _ = candidate_curves({"tables": np.zeros((0, 3, 6)), "neighbour_table": np.zeros((3, 4))}, [])
  assert {row["place"] for row in few} == {"last item", "second last"}


def test_tables_are_those_of_the_tower_that_has_them():
  tables = np.ones((1, 2, 5))
  assert learned_tables({"similarity_tables": tables, "head": {}}) is tables
  assert learned_tables({"generative": {"similarity_tables": tables}, "dense": {}}) is tables


def test_curves_are_the_finite_numbers_of_whole_records(tmp_path):
  path = tmp_path / "metrics.jsonl"
  assert curves(path) == []
  record = {
    "stage": "recommender",
    "kind": "train",
    "step": 5,
    "time": 1.0,
    "loss": 2.5,
    "bad": float("nan"),
    "up": True,
  }
  path.write_text(json.dumps(record) + '\nnot json\n[1]\n{"step": 1}\n{"stage": "cut', encoding="utf-8")
  assert curves(path) == [{"stage": "recommender", "kind": "train", "step": 5, "metric": "loss", "value": 2.5}]


def test_codes_are_counted_most_used_first():
  rows = code_use(np.array([[2, 0], [2, 1], [0, 1]]), num_codes=3)
  assert [(row["level"], row["items"]) for row in rows] == [
    ("level 1", 2), ("level 1", 1), ("level 1", 0), ("level 2", 2), ("level 2", 1), ("level 2", 0)
  ]  # fmt: skip


def test_the_plane_keeps_the_two_widest_directions():
  rng = np.random.default_rng(0)
  along = rng.normal(size=(50, 2)) * [9, 5]
  basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
  flat = plane(along @ basis[:2] + 0.01 * rng.normal(size=(50, 6)) + 7)
  for axis in range(2):
    assert abs(np.corrcoef(flat[:, axis], along[:, axis])[0, 1]) > 0.95
  assert_allclose(flat.std(axis=0), 1, rtol=1e-6)
  assert plane(np.ones((4, 1))).tolist() == [[0, 0]] * 4


def test_the_map_says_of_each_item_what_it_is():
  rng = np.random.default_rng(0)
  names, counts = [f"item {row}" for row in range(6000)], np.arange(6000)
  rows = item_map(rng.normal(size=(6000, 3)), rng.integers(9, size=(6000, 2)), names, counts)
  assert len(rows) == 5000, "a page can hold no more"
  assert all(row["item"] == names[row["in training"]] and 0 <= row["hue"] < 1 for row in rows)
  bare = item_map(rng.normal(size=(3, 3)), None, ["a", "b", "<c>"], np.array([1, 0, 2]))
  assert [sorted(row) for row in bare] == [["in training", "item", "x", "y"]] * 3


def test_items_stand_with_those_whose_ids_begin_alike():
  codes = np.array([[1, 2, 0], [1, 2, 1], [1, 2, 2], [1, 2, 3], [1, 3, 0], [0, 0, 0], [0, 1, 0]])
  counts = np.array([9, 1, 2, 3, 8, 7, 0])
  first, second = prefixes(codes, list("abcdefg"), counts)
  assert (first["prefix"], first["count"]) == ([1, 2], 4)
  assert [one["item"] for one in first["items"]] == ["a", "d", "c", "b"]
  assert (second["prefix"], [one["item"] for one in second["items"]]) == ([0], ["f", "g"])


def test_groups_of_users_have_their_own_metrics():
  rng = np.random.default_rng(0)
  values, ranks = rng.integers(1, 50, size=400), rng.integers(30, size=400).astype(np.int32)
  ranks[:20] = MISS
  rows = by_group(ranks, values)
  assert sum(row["users"] for row in rows if row["metric"] == "NDCG@10") == 400
  for row in rows:
    low, _, high = row["group"].partition("–")
    own = ranks[(values >= int(low)) & (values <= int(high or low))].astype(float)
    assert len(own) == row["users"]
    gains = {"Recall@10": own < 10, "NDCG@10": np.where(own < 10, 1 / np.log2(own + 2), 0)}[row["metric"]]
    assert row["value"] == pytest.approx(gains.mean())
  (one, _) = by_group(np.array([0, 5], np.int32), np.array([3, 3]))
  assert (one["group"], one["users"], one["value"]) == ("3", 2, 1.0)
