"""Semantic IDs for items that are added after training."""

import dataclasses
from collections.abc import Collection, Mapping

import numpy as np

from bbqrec_jax.data.feature_store import FeatureStore
from bbqrec_jax.data.features import feature_widths
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.errors import InputError
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.semantic_ids.repair import reassign_collisions, suffix_collisions
from bbqrec_jax.tokenizer.inference import InferenceTokenizer, check_arrays, encode_blocks, id_space, settings_from_json
from bbqrec_jax.tokenizer.settings import TokenizerSettings


def assign(
  ids: SemanticIds,
  features: Mapping[str, np.ndarray],
  present: Mapping[str, np.ndarray],
  *,
  item_ids: ItemIds | None = None,
  block: int = 2048,
  trusted: Collection[str] = (),
) -> SemanticIds:
  """Quantizes unseen items with a tokenizer that no longer learns; no item that has an ID changes it.

  Features are standardised with the statistics of the items that the tokenizer was trained on, and an unseen item's ID
  vector is the mean of the learned ones. Collisions are repaired among the new items alone.

  Args:
    ids: of the N known items.
    features: modality -> [n, D] of the new items, memory-mapped or not.
    present: modality -> [n] bool.
    item_ids: what the data calls the N known and the n new items; None where those of the known ones are 0..N - 1, and
      the new ones count on.
    block: items that are quantized at once.
    trusted: Python modules outside this project that the tokenizer's parts may be imported from.

  Returns:
    The IDs of N + n items, the new ones at the end.

  Raises:
    InputError: if the new items have no ids and cannot count on, the modalities or their widths are not the
      tokenizer's, the IDs do not suffice, or the tokenizer's arrays and settings do not fit one another.
  """
  if item_ids is None:
    item_ids = ids.item_ids.extended(None, len(next(iter(present.values()))), where="the new items")
  settings, latents, here, codes = _quantized(ids, features, present, block=block, trusted=trusted)
  levels = len(settings.id_streams) * settings.num_levels + (settings.repair == "suffix")
  if ids.streams != settings.streams or ids.codes.shape[1] != levels:
    raise InputError(
      f"the tokenizer's settings speak of streams {settings.streams} and {levels} codes an item, its IDs are of"
      f" {ids.streams} and {ids.codes.shape[1]}: they do not fit one another; train it again"
    )
  raw, id_latents, id_codebooks = id_space(settings, latents, codes, ids.codebooks)
  if settings.repair == "suffix":
    own = suffix_collisions(raw, num_codes=ids.num_codes, taken=ids.codes)
  else:
    own = reassign_collisions(raw, id_latents, id_codebooks, taken=ids.codes)
  return dataclasses.replace(
    ids,
    item_ids=item_ids,
    codes=np.concatenate([ids.codes, own]),
    stream_codes=np.concatenate([ids.stream_codes, codes], axis=1),
    present=np.concatenate([ids.present, here], axis=1),
  )


def quantize(ids: SemanticIds, features: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray]) -> np.ndarray:
  """The codes [S, n, L] of items as the tokenizer, which no longer learns, chooses them for each stream.

  Args:
    ids: of the tokenizer.
    features: modality -> [n, D].
    present: modality -> [n] bool.

  Raises:
    InputError: if the modalities or their widths are not the tokenizer's.
  """
  return _quantized(ids, features, present, block=2048, trusted=())[3]


def _quantized(
  ids: SemanticIds,
  features: Mapping[str, np.ndarray],
  present: Mapping[str, np.ndarray],
  *,
  block: int,
  trusted: Collection[str],
) -> tuple[TokenizerSettings, np.ndarray, np.ndarray, np.ndarray]:
  """The tokenizer's settings, and of the new items the latents [S, n, d], present [S, n] and codes [S, n, L]."""
  settings = settings_from_json(ids.settings, trusted=trusted)
  check_arrays(settings, ids.encoder, ids.codebooks)
  widths = feature_widths(features)
  if widths != dict(settings.modalities):
    raise InputError(
      f"the tokenizer was trained on modalities {dict(settings.modalities)} (name: width), the new items have {widths};"
      " make theirs in the same way"
    )
  ordered = {name: features[name] for name in settings.names}
  store = FeatureStore(ordered, present, ids.encoder)
  tokenizer = InferenceTokenizer(settings, ids.encoder, ids.codebooks)
  count = len(next(iter(ordered.values())))
  latents, here, codes = encode_blocks(lambda items: tokenizer(*store.rows(items)), count, block=block)
  return settings, latents, here, codes
