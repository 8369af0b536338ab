"""What the recommender is told of the items, for every way to compare them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.config import default_config
from bbqrec_jax.data.interactions import from_lengths
from bbqrec_jax.errors import InputError
from bbqrec_jax.ops.similarity import similarities
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.train.recommender_stage import build_catalogue, check_compared

ITEMS, LEVELS, CODES, WIDTH = 30, 3, 4, 5
STREAMS = ("text", "image", "fused")


@pytest.fixture(scope="module")
def ids():
  rng = np.random.default_rng(0)
  own = np.stack(np.unravel_index(rng.choice(CODES**LEVELS, ITEMS, replace=False), (CODES,) * LEVELS), axis=1)
  present = np.ones((3, ITEMS), bool)
  present[1] = rng.random(ITEMS) < 0.7
  return SemanticIds(
    streams=STREAMS,
    codes=own.astype(np.int32),
    stream_codes=rng.integers(CODES, size=(3, ITEMS, LEVELS)).astype(np.int32),
    present=present,
    codebooks=rng.normal(size=(1, LEVELS, CODES, WIDTH)).astype(np.float32),
    data_hash="of a test",
  )


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


def test_equal_width_buckets_need_no_history(ids, histories):
  catalogue, settings = build(ids, histories, similarity_kind="equal_width", num_buckets=4)
  assert settings.num_buckets == 4
  assert_allclose(catalogue.edges, np.tile([-0.5, 0.0, 0.5], (3, 1)))


def test_overlap_compares_the_streams_codes(ids, histories):
  catalogue, settings = build(ids, histories, similarity_kind="overlap", similarity=("modalities", "fused"))
  assert len(settings.pairs) == 6
  assert settings.num_buckets == 2 * LEVELS + 1
  assert catalogue.edges.shape == (6, 2 * LEVELS)
  streams = np.asarray(catalogue.streams)
  for stream in range(3):
    expected = np.where(ids.present[stream][:, None], ids.stream_codes[stream], -1)
    assert_array_equal(streams[:, stream], expected)
  assert (streams == -1).any()


def test_a_continuous_bias_has_a_slope_and_no_buckets(ids, histories):
  catalogue, settings = build(ids, histories, similarity_kind="continuous", layer_tables=True, cross_pairs=False)
  assert settings.table_shape == (2, 2, 2, 3)
  assert catalogue.streams.dtype == np.float32


def test_content_codes_are_columns_of_their_own(ids, histories):
  rng = np.random.default_rng(2)
  content = dataclasses.replace(
    ids, stream_codes=rng.integers(CODES, size=(3, ITEMS, LEVELS)).astype(np.int32), present=ids.present[::-1]
  )
  both = dataclasses.replace(ids, content=content)
  catalogue, settings = build(both, histories, item_inputs=("fused", "content", "item"))
  assert settings.num_columns == 4 * LEVELS
  columns, first = np.asarray(catalogue.columns), CODES * np.arange(4 * LEVELS)
  assert_array_equal(columns[:, :LEVELS] - first[:LEVELS], ids.codes)
  for stream in range(3):
    mine = slice((stream + 1) * LEVELS, (stream + 2) * LEVELS)
    expected = np.where(content.present[stream][:, None], content.stream_codes[stream] + first[mine], -1)
    assert_array_equal(columns[:, mine], expected)
  with pytest.raises(InputError, match="came without content codes: train a tokenizer with"):
    build(ids, histories, item_inputs=("fused", "content", "item"))


def test_streams_of_different_codebooks_are_not_compared(ids, histories):
  rng = np.random.default_rng(3)
  own = dataclasses.replace(ids, codebooks=rng.normal(size=(3, LEVELS, CODES, WIDTH)).astype(np.float32))
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
    check_compared(config, present, histories)
    return
  with pytest.raises(InputError, match=f"no training history holds two items that both have {named}, so their"):
    check_compared(config, present, histories)


def test_without_similarity_there_is_nothing_to_compare(ids, histories):
  catalogue, settings = build(ids, histories, similarity=())
  assert settings.num_streams == catalogue.streams.shape[1] == 0
