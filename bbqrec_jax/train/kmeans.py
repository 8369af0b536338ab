"""Codes by residual k-means of the features: nothing is learned of behaviour, and no gradient is taken."""

import dataclasses
from typing import Any

import numpy as np

from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.feature_store import FeatureStore
from bbqrec_jax.data.features import feature_widths
from bbqrec_jax.models.frozen import RQ_KMEANS, FrozenTokenizer, content_latents, encode_blocks
from bbqrec_jax.models.tokenizer import TokenizerSettings
from bbqrec_jax.ops.kmeans import residual_kmeans
from bbqrec_jax.semantic_ids.artefact import SemanticIds


def kmeans_settings(config: Any, dataset: Dataset, *, semantic_id: str) -> TokenizerSettings:
  """Those of residual k-means of the features."""
  t, widths = config.tokenizer, feature_widths(dataset.features)
  return TokenizerSettings(
    tuple(widths.items()), num_items=dataset.num_items, num_levels=t.num_levels, num_codes=t.num_codes,
    code_width=sum(widths.values()), item_id="none", semantic_id=semantic_id, codebooks="per_stream",
    quantizer=RQ_KMEANS,
  )  # fmt: skip


def kmeans_codebooks(config: Any, settings: TokenizerSettings, store: FeatureStore) -> np.ndarray:
  """Residual k-means of the standardised features, one codebook a stream: [S, L, K, sum of D] float32."""
  t = config.tokenizer

  class Stream:
    """One stream's latents [N, d], made of the features a block at a time."""

    def __init__(self, index):
      self.index = index

    def __len__(self):
      return settings.num_items

    def __getitem__(self, rows):
      return content_latents(*store.rows(np.arange(settings.num_items)[rows]))[0][self.index]

  streams: list[Any] = [Stream(index) for index in range(len(settings.streams))]
  weights = [*(np.asarray(store.present[name], np.float32) for name in settings.names), None]
  return np.stack([
    residual_kmeans(
      config.seed, streams[index], num_levels=t.num_levels, num_codes=t.num_codes, weights=weight,
      iterations=t.kmeans_iterations, sample=t.kmeans_points, block=4096,
    )
    for index, weight in enumerate(weights)
  ])  # fmt: skip


def content_codes(config: Any, dataset: Dataset, *, data_hash: str) -> SemanticIds:
  """What residual k-means makes of the features of all items, for a tokenizer's `SemanticIds.content`."""
  settings = kmeans_settings(config, dataset, semantic_id="fused")
  store = FeatureStore(dataset.features, dataset.present)
  codebooks = kmeans_codebooks(config, settings, store)
  frozen = FrozenTokenizer(settings, store.arrays(), codebooks)
  # Without the latents, which are as wide as the features.
  present, codes = encode_blocks(lambda items: frozen(*store.rows(items))[1:], dataset.num_items, block=2048)
  return SemanticIds(
    streams=settings.streams,
    codes=codes[-1],
    stream_codes=codes,
    present=present,
    codebooks=codebooks,
    data_hash=data_hash,
    settings=dataclasses.asdict(settings),
    encoder=store.arrays(),
  )
