"""Signals of candidates against counting by hand, and the network of them against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from bbqrec_jax.data.interactions import from_lengths
from bbqrec_jax.data.title_words import similar_titles
from bbqrec_jax.recommender.signals import (
  SIGNALS,
  build_sources,
  is_fitted,
  network,
  network_shapes,
  no_network,
  signals,
)

ITEMS = 6


@pytest.fixture
def sources():
  histories = from_lengths(np.array([0, 1, 2, 0, 1, 3, 4, 1]), np.array([3, 3, 2]), np.array(["a", "b", "c"]))
  return build_sources(
    histories, num_items=ITEMS, count=5, titles=("red mug", "Red Pan", "", "blue mug", "bowl", "red")
  )


def by_name(values):
  return dict(zip(SIGNALS, map(np.asarray, values), strict=True))


def test_signals_say_what_stands_with_follows_and_precedes(sources):
  recent = jnp.array([[1, 0, -1], [5, -1, -1]])
  base = jnp.asarray(np.random.default_rng(0).normal(size=(2, ITEMS)), jnp.float32)
  found = by_name(signals(sources, recent, 2 * base, base, last_items=2))
  assert_allclose(found["scores"], 2 * base)
  assert_allclose(found["base"], base)
  assert_allclose(found["popularity"], np.tile(np.log1p([2, 3, 1, 1, 1, 0]), (2, 1)), rtol=1e-6)
  assert_allclose(found["endings"], np.tile(np.log1p([0, 1, 1, 1, 0, 0]), (2, 1)), rtol=1e-6)  # Ends: 2, 3 and 1.
  assert found["seen"].tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]
  # 1 is followed once each by 2 and 3, and preceded twice by 0 and once by 4.
  assert_allclose(found["next"][0], np.sqrt([0, 0, 1 / np.sqrt(4 * 3), 1 / np.sqrt(4 * 3), 0, 0]), rtol=1e-6)
  assert_allclose(found["previous"][0], np.sqrt([2 / np.sqrt(5 * 4), 0, 0, 0, 1 / np.sqrt(5 * 3), 0]), rtol=1e-6)
  # 0 stands with 1 twice, with 2 and 3 once; 1 with 0 twice, with 2, 3 and 4 once.
  totals = np.array([4, 5, 2, 2, 1, 0]) + 2
  counts = np.array([[0, 2, 1, 1, 0, 0], [2, 0, 1, 1, 1, 0]])
  strengths = counts / np.sqrt(totals[:2, None] * totals)
  assert_allclose(found["together"][0], strengths[1] + 0.8 * strengths[0], rtol=1e-6)
  # The last item shares "red" with 0 and 5, the one before it also "mug" with 3.
  _, likeness = similar_titles(("red mug", "Red Pan", "", "blue mug", "bowl", "red"), count=5)
  assert_allclose(found["titles"][0, [5, 3]], [likeness[1, 0] + 0.8 * likeness[0, 0], 0.8 * likeness[0, 1]], rtol=1e-6)
  assert not found["titles"][0, [2, 4]].any()
  for name in ("together", "next", "previous"):
    assert not found[name][1].any(), "nothing is known of an item that is in no history"


def test_signals_of_some_are_those_of_all(sources):
  rng = np.random.default_rng(1)
  recent, items = jnp.array([[1, 0, 4], [3, -1, -1]]), jnp.asarray(rng.integers(0, ITEMS, (2, 9)))
  base = jnp.asarray(rng.normal(size=(2, ITEMS)), jnp.float32)
  every = by_name(signals(sources, recent, base, base, last_items=3))
  own = jnp.take_along_axis(base, items, axis=1)
  some = by_name(signals(sources, recent, own, own, last_items=3, items=items))
  for name, values in some.items():
    assert_allclose(values, np.take_along_axis(every[name], np.asarray(items), axis=1), rtol=1e-6, err_msg=name)


def test_the_network_is_its_formula():
  rng = np.random.default_rng(2)
  params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in network_shapes(3).items()}
  values = [rng.normal(size=(2, 5)).astype(np.float32) for _ in SIGNALS]
  z = (np.stack(values, axis=-1) - params["signal_mean"]) * params["signal_scale"]
  expected = z @ params["direct"] + np.maximum(z @ params["hidden"] + params["bias"], 0) @ params["output"]
  assert_allclose(jax.jit(network)(params, values), expected, rtol=1e-4, atol=1e-5)
  assert is_fitted(params)
  assert not is_fitted(no_network(3))
  assert not np.any(network(no_network(3), values))
