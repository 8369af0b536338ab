"""Standardised features against NumPy, and which of new items' are told of."""

import numpy as np
import pytest

from bbqrec_jax.data.feature_store import FURTHEST, FeatureStore, far_features, squeezed_columns


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


Z = np.random.default_rng(5).normal(size=(500, 2))


def standardised(array):
  store = FeatureStore({"text": array}, {"text": np.ones(len(array), bool)})
  return store.rows(np.arange(len(array)))[0]["text"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
  ("centre", "scale", "dtype"),
  [
    (0, 1, "f4"), (1.7e9, 100, "f8"), (1.7e12, 8.64e7, "f8"), (1e18, 1e10, "f8"), (1e15, 1e6, "f8"), (-1e9, 1, "f8"),
    (1.7e7, 300, "f4"), (0, 1e38, "f4"), (1e38, 1e36, "f4"), (0, 1e-42, "f4"), (0, 1e-60, "f8"), (0, 1e37, "f8"),
    (0, 2e4, "f2"), (6e4, 500, "f2"),
  ],
)  # fmt: skip
def test_columns_of_any_centre_and_scale_are_standardised(centre, scale, dtype):
  array = (centre + scale * np.clip(Z, -3, 3)).astype(dtype)
  exact = array.astype(np.longdouble)
  expected = (exact - exact.mean(axis=0)) / exact.std(axis=0)
  np.testing.assert_allclose(standardised(array), expected.astype(np.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_columns_of_extremes_alone_are_standardised():
  largest = np.finfo(np.float32).max
  skewed = np.where(np.arange(30)[:, None] == 3, largest, -largest).astype(np.float32)
  np.testing.assert_allclose(standardised(skewed)[3], np.sqrt(29), rtol=1e-6)
  halves = np.where(np.arange(30)[:, None] < 15, largest, -largest).astype(np.float32)
  np.testing.assert_allclose(np.abs(standardised(halves)), 1.0, rtol=1e-6)


@pytest.mark.parametrize("value", [0.1, 1.7e9 + 0.1, -3e38, 1e-40, 7e3])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_a_constant_column_is_zero_whatever_it_is(value, dtype):
  array = np.full((999, 1), value)
  if np.abs(value) <= np.finfo(dtype).max:
    np.testing.assert_allclose(standardised(array.astype(dtype)), 0.0, atol=1e-15)


def test_a_column_that_its_dtype_hardly_tells_from_a_constant_is_next_to_zero():
  array = np.full((999, 1), 1.7e9, np.float32)
  array[::100] = np.nextafter(array[0], np.float32(2e9))
  assert np.ptp(array) == 128
  assert np.abs(standardised(array)).max() < 1e-6


@pytest.mark.filterwarnings("error")
def test_a_new_item_at_an_end_of_float32_stays_finite_and_is_told_of():
  known = FeatureStore({"text": Z * 1e-3}, {"text": np.ones(500, bool)})
  new = FeatureStore({"text": np.full((1, 2), 3e38, np.float32)}, {"text": np.ones(1, bool)}, known.arrays())
  np.testing.assert_array_equal(new.rows(np.arange(1))[0]["text"], FURTHEST)
  (sentence,) = far_features(new, num_known=500)
  assert "is 1000000 or more standard deviations from the mean" in sentence


def test_columns_that_outliers_squeeze_are_named():
  def said(array, absent=()):
    return squeezed_columns(FeatureStore({"text": array}, {"text": ~np.isin(np.arange(len(array)), absent)}))

  array = Z.astype(np.float32)
  assert said(array) == []
  array[7, 1] = 1e30
  (sentence,) = said(array)
  assert sentence.startswith("text features: column 1 holds outliers")
  array[[9, 300], 0] = -1e9, 1e9
  (sentence,) = said(array)
  assert "column 0 and 1 more" in sentence
  assert said(array, absent=(7, 9, 300)) == [], "what is absent stretches nothing"
  rare = np.zeros((500, 1), np.float32)
  rare[3] = 1.0
  assert said(rare) == [], "a flag that one item has is no outlier: nothing else is lost beside it"
  assert said(np.exp(2 * Z)) == []
  assert len(said(np.append(np.arange(9.0), 1e30)[:, None])) == 1
