"""Standardised features against NumPy, and which of new items' are told of."""

import numpy as np

from bbqrec_jax.data.feature_store import FeatureStore, far_features


def test_feature_store_standardises_what_is_there_and_zeros_what_is_not():
  rng = np.random.default_rng(0)
  features = (5.0 + rng.normal(size=(400, 6)) * np.array([1.0, 10.0, 0.1, 3.0, 100.0, 1.0])).astype(np.float32)
  features[:, 5] = 7.0  # A constant column has no spread to divide by.
  present = rng.random(400) < 0.6
  features[~present] = 1e6  # What stands in an absent row must not matter.
  store = FeatureStore({"text": features}, {"text": present})
  values, here = (part["text"] for part in store.rows(np.arange(400)))
  assert values.dtype == np.float32
  np.testing.assert_array_equal(here, present)
  np.testing.assert_array_equal(values[~present], 0.0)
  kept = values[present].astype(np.float64)
  # float32 features around 5 with a spread of 0.1 carry about 5 digits behind their mean.
  np.testing.assert_allclose(kept.mean(axis=0), 0.0, atol=1e-5)
  np.testing.assert_allclose(kept[:, :5].std(axis=0), 1.0, rtol=1e-5)
  np.testing.assert_array_equal(kept[:, 5], 0.0)


def test_feature_store_gives_rows_in_the_order_asked_for():
  rng = np.random.default_rng(2)
  features = {"text": rng.normal(3.0, 2.0, (30, 5)), "image": rng.normal(size=(30, 3)).astype(np.float16)}
  store = FeatureStore(features, {"text": np.ones(30, bool), "image": rng.random(30) < 0.7})
  every, here = store.rows(np.arange(30))
  chosen = np.array([7, 7, 0, 29, 3])
  rows, present = store.rows(chosen)
  for name in ("text", "image"):
    assert rows[name].dtype == np.float32
    assert present[name].dtype == bool
    np.testing.assert_array_equal(rows[name], every[name][chosen])
    np.testing.assert_array_equal(present[name], here[name][chosen])


def test_the_table_is_the_rows_of_all_items_however_it_is_made():
  rng = np.random.default_rng(3)
  features = {"text": rng.normal(size=(7, 3)).astype(np.float16), "image": rng.normal(size=(7, 2))}
  store = FeatureStore(features, {"text": np.ones(7, bool), "image": np.arange(7) != 4})
  values, present = store.rows(np.arange(7))
  for block in (1, 3, 7, 100):
    table = store.table(block=block)
    for name in features:
      np.testing.assert_array_equal(table[0][name], values[name])
      np.testing.assert_array_equal(table[1][name], present[name])
  assert store.nbytes == sum(array.nbytes for part in table for array in part.values())


def test_features_that_no_known_item_can_have_are_told_of():
  rng = np.random.default_rng(4)
  statistics = {}
  for name, width in (("text", 8), ("image", 5)):
    statistics |= {f"mean/{name}": rng.normal(size=width), f"deviation/{name}": rng.uniform(0.5, 2.0, width)}
  features = {name: rng.normal(size=(6, width)) for name, width in (("text", 8), ("image", 5))}
  present = {name: np.ones(6, bool) for name in features}

  def said(**options):
    return far_features(FeatureStore(features, present, statistics), num_known=30, **options)

  assert said() == []
  mean, deviation, bound = statistics["mean/image"], statistics["deviation/image"], np.sqrt(29)
  features["image"][1, 2] = (mean + 0.99 * bound * deviation)[2]
  assert said() == []
  features["image"][4, 3] = (mean - 7.0 * bound * deviation)[3]
  features["image"][5, 0] = (mean + 2.0 * bound * deviation)[0]
  for block in (1, 4, 100):
    (sentence,) = said(block=block)
    assert sentence.startswith("image features of 2 of 6 new items")
    assert "row 4 column 3 is 38 standard deviations from the mean" in sentence
    assert "of 30 can be further than 5;" in sentence
  features["text"][0, 7] = 1e6
  assert [sentence.split()[0] for sentence in said()] == ["text", "image"]
  for mask in present.values():
    mask[[0, 4, 5]] = False  # What an item does not have cannot be wrong.
  assert said() == []


def test_no_row_of_a_column_is_further_from_the_mean_than_the_bound():
  column = np.zeros((30, 1), np.float32)
  column[3] = 5.0
  store = FeatureStore({"text": column}, {"text": np.ones(30, bool)})
  np.testing.assert_allclose(store.rows(np.array([3]))[0]["text"], np.sqrt(29), rtol=1e-5)
  assert far_features(store, num_known=30) == []
