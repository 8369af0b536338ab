"""Residual k-means of the features themselves, the baseline without gradients and without behaviour."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.feature_store import FeatureStore
from bbqrec_jax.errors import InputError
from bbqrec_jax.ops.kmeans import residual_kmeans
from bbqrec_jax.tokenizer.settings import TokenizerSettings


def content_latents(
  features: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
  """Features themselves as latents: each modality in columns of its own, and the fused stream as all of them.

  Args:
    features: modality -> [B, D] standardised; divided by the root of D here, so that modalities weigh alike.
    present: modality -> [B] bool.

  Returns:
    values [S, B, sum of D] float32 and present [S, B], of each modality and of "fused"; where an item lacks a modality,
    its fused latent stands in.
  """
  names = list(features)
  parts = [np.where(present[name][:, None], features[name], 0) / np.sqrt(features[name].shape[1]) for name in names]
  columns = np.cumsum([0] + [part.shape[1] for part in parts])
  fused = np.concatenate(parts, axis=1).astype(np.float32)
  values = np.zeros((len(names) + 1, *fused.shape), np.float32)
  masks = np.ones((len(names) + 1, len(fused)), bool)
  for index, name in enumerate(names):
    mine = slice(columns[index], columns[index + 1])
    values[index, :, mine] = fused[:, mine]
    masks[index] = present[name]
  values[-1] = fused
  return np.where(masks[..., None], values, fused[None]), masks


def check_varied(dataset: Dataset, *, block: int = 2048) -> None:
  """Refuses constant features, which k-means cannot cluster.

  Raises:
    InputError: if a modality's features are the same in all items that have it.
  """
  for name in dataset.modalities:
    store, here = dataset.store.of(name), np.flatnonzero(dataset.present[name])
    parts = (here[first : first + block] for first in range(0, len(here), block))
    if not any(store.rows(items)[0][name].any() for items in parts):
      others = [other for other in dataset.modalities if other != name]
      mend = f"--config.data.modalities={','.join(others)}" if others else "--config=sasrec"
      raise InputError(
        f"{dataset.source}: the {name} features of all {len(here)} items that have them are the same, so there is"
        f" nothing to quantize; give others, or do without them: {mend}"
      )


_IN_MEMORY = 2**26  # Numbers.


class _Latents:
  """Latents [N, d] of the features of some modalities, beside one another, made a block at a time."""

  def __init__(self, store: FeatureStore):
    self._store = store

  def __len__(self):
    return self._store.num_items

  def __getitem__(self, rows):
    return content_latents(*self._store.rows(np.arange(len(self))[rows]))[0][-1]


def kmeans_codebooks(settings: TokenizerSettings, store: FeatureStore, *, seed: int) -> np.ndarray:
  """Residual k-means of the standardised features, one codebook per stream: [S, L, K, sum of D] float32."""
  width = sum(width for _, width in settings.modalities)

  def fitted(some: FeatureStore, weights: np.ndarray | None) -> np.ndarray:
    points: Any = _Latents(some)
    if settings.num_items * sum(array.shape[1] for array in some.features.values()) <= _IN_MEMORY:
      points = points[:]  # Each pass over them would make them anew.
    return residual_kmeans(
      seed, points, num_levels=settings.num_levels, num_codes=settings.num_codes, weights=weights,
      iterations=settings.kmeans_iterations, block=4096,
    )  # fmt: skip

  codebooks = np.zeros((len(settings.streams), settings.num_levels, settings.num_codes, width), np.float32)
  first = 0
  for index, (name, width) in enumerate(settings.modalities):
    # In columns of its own alone: it is zero in the others'.
    own = fitted(store.of(name), np.asarray(store.present[name], np.float32))
    codebooks[index, :, :, first : first + width] = own
    first += width
  codebooks[-1] = fitted(store, None)
  return codebooks
