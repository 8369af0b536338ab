"""Residual k-means of the features: each modality in columns of its own, whether or not all fits into memory."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from bbqrec_jax.data.feature_store import FeatureStore
from bbqrec_jax.ops.kmeans import residual_kmeans
from bbqrec_jax.tokenizer import kmeans
from bbqrec_jax.tokenizer.kmeans import content_latents
from bbqrec_jax.tokenizer.settings import TokenizerSettings

ITEMS, LEVELS, CODES, SEED = 60, 2, 5, 3


@pytest.fixture(scope="module")
def store():
  rng = np.random.default_rng(0)
  features = {"text": rng.normal(3.0, 2.0, size=(ITEMS, 6)), "image": rng.normal(size=(ITEMS, 3))}
  return FeatureStore(features, {"text": np.ones(ITEMS, bool), "image": np.arange(ITEMS) % 3 > 0})


def fitted(store):
  settings = TokenizerSettings(
    (("text", 6), ("image", 3)), num_items=ITEMS, num_levels=LEVELS, num_codes=CODES, kmeans_iterations=3,
    item_id="none", codebooks="per_stream", quantizer="rq_kmeans",
  )  # fmt: skip
  return kmeans.kmeans_codebooks(settings, store, seed=SEED)


def test_each_stream_has_the_codebook_of_its_own_latents(store):
  codebooks = fitted(store)
  values, _ = content_latents(*store.rows(np.arange(ITEMS)))
  for index, weights in enumerate((None, store.present["image"].astype(np.float32), None)):
    own = residual_kmeans(SEED, values[index], num_levels=LEVELS, num_codes=CODES, weights=weights, iterations=3)
    np.testing.assert_allclose(codebooks[index], own, atol=1e-5)
  assert not codebooks[0, ..., 6:].any()
  assert not codebooks[1, ..., :6].any()


def test_what_does_not_fit_into_memory_gives_the_same(store, monkeypatch):
  expected = fitted(store)
  monkeypatch.setattr(kmeans, "_IN_MEMORY", 0)
  assert_array_equal(fitted(store), expected)
