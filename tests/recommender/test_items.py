"""What the recommender is told of the items, for every way to compare them, and the settings that follow from it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.config import default_config
from bbqrec_jax.data.feature_store import FeatureStore
from bbqrec_jax.data.interactions import from_lengths
from bbqrec_jax.errors import InputError
from bbqrec_jax.ops.similarity import similarities
from bbqrec_jax.recommender.items import (
  build_catalogue,
  check_compared,
  item_features,
  recommender_settings,
  sampled_similarities,
)
from bbqrec_jax.recommender.settings import needs_semantic_ids
from bbqrec_jax.utils.settings import to_config

ITEMS, LEVELS, CODES = 30, 3, 4  # Of `ids`.


@pytest.fixture(scope="module")
def histories():
  rng = np.random.default_rng(1)
  lengths = rng.integers(1, 12, 200)
  return from_lengths(rng.integers(ITEMS, size=lengths.sum()), lengths, np.arange(200).astype(str))


def build(ids, histories, **changes):
  config = default_config()
  config.update_from_flattened_dict({f"recommender.{name}": value for name, value in changes.items()})
  return build_catalogue(config, ids, histories, num_items=ITEMS)


def in_histories(catalogue, settings, histories):
  """The similarities [n] of each stream pair, over all pairs of places of the histories that have both."""
  lengths, longest = histories.lengths, histories.lengths.max()
  items = np.zeros((len(lengths), longest), int)
  real = np.arange(longest) < lengths[:, None]
  items[real] = histories.items
  values, known = similarities(jnp.asarray(catalogue.streams)[items], jnp.asarray(real), pairs=settings.pairs)
  different = np.asarray(known) & ~np.eye(longest, dtype=bool)
  return [value[mask] for value, mask in zip(np.asarray(values), different, strict=True)]


def test_equal_frequency_buckets_are_even_over_the_pairs_of_training_histories(ids, histories):
  catalogue, settings = build(ids, histories, num_buckets=8)
  assert settings.pairs == ((0, 0), (1, 1), (0, 1))
  vectors = np.stack([ids.vectors("text"), ids.vectors("image")], axis=1)
  assert_array_equal(catalogue.streams, vectors)
  for values, edges in zip(in_histories(catalogue, settings, histories), np.asarray(catalogue.edges), strict=True):
    share = np.bincount(np.searchsorted(edges, values, side="right"), minlength=8) / len(values)
    # 30 items are few, so equal values are many: as even as those allow.
    assert_allclose(share, np.full(8, 1 / 8), atol=0.04)


def test_buckets_are_those_of_the_items_that_the_model_is_shown_the_last_ones_of_a_history():
  # Of four directions: items 0 and 1 are alike, 2 and 3 are opposites, and those are at right angles to these.
  vectors = np.array([[1, 0], [1, 0], [0, 1], [0, -1]], np.float32)[:, None]
  histories = from_lengths(np.array([0, 1, 0, 1, 2, 3, 0, 1]), np.array([6, 2]), np.array(["long", "short"]))

  def found(max_length):
    (sample,) = sampled_similarities(vectors, histories, ((0, 0),), max_length=max_length, seed=0)
    return {float(value): float(np.mean(sample == value)) for value in np.unique(sample)}

  # In proportion to the pairs of each: one of the long history's last two items, one of the short one's.
  assert found(2) == pytest.approx({-1.0: 0.5, 1.0: 0.5}, abs=0.01)
  assert found(3) == pytest.approx({-1.0: 1 / 4, 0.0: 2 / 4, 1.0: 1 / 4}, abs=0.01)
  assert found(6) == found(20) == pytest.approx({-1.0: 1 / 16, 0.0: 8 / 16, 1.0: 7 / 16}, abs=0.01)


def test_overlap_compares_the_streams_codes(ids, histories):
  catalogue, settings = build(ids, histories, similarity_kind="overlap", similarity=("modalities", "fused"))
  assert len(settings.pairs) == 6
  assert settings.table_buckets == 2 * LEVELS + 1
  assert catalogue.edges.shape == (6, 2 * LEVELS)
  streams = np.asarray(catalogue.streams)
  for stream in range(3):
    expected = np.where(ids.present[stream][:, None], ids.stream_codes[stream], -1)
    assert_array_equal(streams[:, stream], expected)
  assert (streams == -1).any()


def test_a_continuous_bias_has_a_slope_and_no_buckets(ids, histories):
  catalogue, settings = build(ids, histories, similarity_kind="continuous", cross_pairs=False)
  assert settings.table_shape == (2, 2, 3)
  assert catalogue.streams.dtype == np.float32


def test_streams_of_different_codebooks_are_not_compared(ids, histories):
  rng = np.random.default_rng(3)
  own = dataclasses.replace(ids, codebooks=rng.normal(size=(3, LEVELS, CODES, 5)).astype(np.float32))
  _, settings = build(own, histories)
  assert settings.pairs == ((0, 0), (1, 1))
  assert settings.table_shape[0] == 2


@pytest.mark.parametrize(
  ("image", "changes", "named"),
  [
    ([4], {}, "image"),
    ([4, 5], {}, None),
    ([4, 5], {"recommender.max_length": 2}, "image"),
    ([4], {"recommender.similarity": ("fused",)}, None),
    ([4], {"recommender.similarity_kind": "overlap"}, None),
    ([2, 3], {}, "text and image"),
    ([2, 3], {"tokenizer.codebooks": "per_stream"}, None),
  ],
)
def test_modalities_that_no_history_can_compare_are_refused(image, changes, named):
  # Items 4 and 5 stand in one history, three apart; 2 and 3 in another, and have no text.
  histories = from_lengths(np.array([4, 0, 1, 5, 2, 3]), np.array([4, 2]), np.array(["a", "b"]))
  present = {"text": np.isin(np.arange(ITEMS), [0, 1, 4, 5]), "image": np.isin(np.arange(ITEMS), image)}
  config = default_config()
  config.update_from_flattened_dict(changes)
  if named is None:
    check_compared(config, None, present, histories)
    return
  with pytest.raises(
    InputError, match=f"no training history holds two items that both have {named}, so their"
  ) as error:
    check_compared(config, None, present, histories)
  message = str(error.value)
  assert "data.modalities=text" in message
  assert ("recommender.cross_pairs=False" in message) == (" and " in named)
  if " and " in named:
    config.recommender.cross_pairs = False
    check_compared(config, None, present, histories)
  with pytest.raises(InputError) as error:
    check_compared(config, None, {"image": np.isin(np.arange(ITEMS), [4])}, histories)
  assert "data.modalities" not in str(error.value), "there is no other"


def test_without_similarity_there_is_nothing_to_compare(ids, histories):
  catalogue, settings = build(ids, histories, similarity=())
  assert settings.num_streams == catalogue.streams.shape[1] == 0


def test_the_settings_are_those_of_the_config_with_what_the_data_gives(ids, histories):
  _, settings = build(ids, histories, width=10, similarity=("fused",), **{"dense_tower.width": 12})
  config = default_config().recommender
  config.width, config.similarity, config.dense_tower.width = 10, ("fused",), 12
  assert to_config(settings) == config
  assert (settings.num_items, settings.num_levels, settings.num_codes) == (ITEMS, LEVELS, CODES)
  assert (settings.num_columns, settings.num_streams, settings.feature_width) == (3 * LEVELS, 1, 0)


@pytest.mark.parametrize(
  "changes",
  [
    {"recommender.similarity": ("fused",)},
    {"recommender.similarity_kind": "overlap", "recommender.item_inputs": ("fused", "features")},
    {"recommender.similarity_kind": "continuous", "recommender.item_inputs": ("modalities",)},
    {"recommender.head": "hybrid", "recommender.dense_tower.width": 8, "recommender.similarity": ()},
    {"recommender.head": "dense", "recommender.item_inputs": ("features", "item"), "recommender.similarity": ()},
  ],
  ids=str,
)
@pytest.mark.parametrize("trained", [False, True])
def test_the_settings_are_known_before_there_are_semantic_ids(ids, histories, changes, trained):
  config = default_config()
  sizes = {"tokenizer.num_levels": LEVELS + trained, "tokenizer.num_codes": CODES + trained}
  config.update_from_flattened_dict(changes | sizes)
  features = {name: np.random.default_rng(3).normal(size=(ITEMS, 4)).astype(np.float32) for name in ids.modalities}
  present = {name: np.ones(ITEMS, bool) for name in features}
  given = ids if needs_semantic_ids(config) else None
  rows = item_features(config, FeatureStore(features, present))
  _, settings = build_catalogue(config, given, histories, num_items=ITEMS, features=rows)
  known = given if trained else None
  assert recommender_settings(config, known, num_items=ITEMS, num_modalities=2, feature_widths=[4, 4]) == settings
