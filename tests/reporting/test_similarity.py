"""The figure of the learned tables shows their numbers."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from bbqrec_jax.reporting.similarity import bucket_centres, learned_tables, similarity_figure


def test_buckets_stand_midway_between_their_edges():
  assert_allclose(bucket_centres(np.array([0.0, 0.2, 0.6])), [-0.1, 0.1, 0.4, 0.8])
  assert_allclose(bucket_centres(np.array([0.3])), [-0.2, 0.8])


@pytest.mark.parametrize("layers", [None, 2])
def test_each_panel_has_a_line_a_head_with_its_numbers(layers):
  rng = np.random.default_rng(0)
  edges = np.sort(rng.uniform(-1, 1, size=(3, 4)), axis=1)
  tables = rng.normal(size=(3, 2, 7) if layers is None else (layers, 3, 2, 7))
  figure = similarity_figure(tables, edges, ["text", "image", "text with image"])
  assert len(figure.axes) == 3 * (layers or 1)
  for panel, own in zip(figure.axes, tables.reshape(-1, 2, 7), strict=True):
    lines = [line for line in panel.get_lines() if line.get_label().startswith("head")]
    for head, line in enumerate(lines):
      assert_allclose(line.get_ydata(), own[head, :5])
      assert f"itself {own[head, 5]:+.2f}, missing {own[head, 6]:+.2f}" in line.get_label()
    assert len(lines) == 2


def test_a_continuous_bias_is_a_straight_line():
  tables = np.array([[[0.5, 0.1, 0.2]]])
  (panel,) = similarity_figure(tables, np.zeros((1, 0)), ["text"]).axes
  assert_allclose(panel.get_lines()[0].get_xydata(), [[-1, -0.5], [1, 0.5]])


def test_tables_are_those_of_the_tower_that_has_them():
  tables = np.ones((1, 2, 5))
  assert learned_tables({"similarity_tables": tables, "head": {}}) is tables
  assert learned_tables({"generative": {"similarity_tables": tables}, "dense": {}}) is tables
