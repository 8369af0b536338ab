"""What the recommender is told of the items, for every way to compare them."""

import dataclasses
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.config import default_config
from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.feature_store import FeatureStore
from bbqrec_jax.data.interactions import from_lengths
from bbqrec_jax.errors import InputError
from bbqrec_jax.models.catalogue import RecommenderSettings
from bbqrec_jax.models.recommender import check_parts
from bbqrec_jax.models.two_towers import make_recommender
from bbqrec_jax.ops.similarity import similarities
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.train.recommender_stage import build_catalogue, expected_settings, item_features, needs_semantic_ids

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


def test_without_similarity_there_is_nothing_to_compare(ids, histories):
  catalogue, settings = build(ids, histories, similarity=())
  assert settings.num_streams == catalogue.streams.shape[1] == 0


@pytest.mark.parametrize(
  "changes",
  [
    {"recommender.similarity": ("fused",)},
    {"recommender.similarity_kind": "overlap", "recommender.item_inputs": ("fused", "features", "content")},
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
  features = {name: np.random.default_rng(3).normal(size=(ITEMS, 4)).astype(np.float32) for name in STREAMS[:2]}
  present = {name: np.ones(ITEMS, bool) for name in features}
  dataset = Dataset("of a test", "nowhere", histories, features, present, ("",) * ITEMS)
  given = dataclasses.replace(ids, content=ids) if needs_semantic_ids(config) else None
  rows = item_features(config, FeatureStore(features, present))
  _, settings = build_catalogue(config, given, histories, num_items=ITEMS, features=rows)
  assert expected_settings(config, dataset, given if trained else None) == settings


@pytest.mark.parametrize("backbone", ["causal", "encoder_decoder"])
@pytest.mark.parametrize("head", ["generative", "dense", "parallel", "hybrid"])
def test_every_head_and_backbone_of_this_project_can_be_made(head, backbone):
  check_parts(RecommenderSettings(ITEMS, head=head, backbone=backbone))


def test_the_readmes_own_head_can_be_made(tmp_path, monkeypatch):
  readme = (pathlib.Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
  (lines,) = re.findall(r"```python\n# my_heads\.py\n(.*?)```", readme, flags=re.DOTALL)
  (tmp_path / "my_heads.py").write_text(lines)
  monkeypatch.syspath_prepend(tmp_path)
  check_parts(RecommenderSettings(ITEMS, head="my_heads:nearest"))


@pytest.mark.parametrize("part", ["head", "backbone"])
@pytest.mark.parametrize(
  ("name", "came"),
  [
    ("json:loads", "TypeError: the JSON object must be str"),
    ("builtins:id", "a int without "),
    ("bbqrec_jax.models.heads:ParallelHead", "TypeError: "),
  ],
)
def test_a_function_that_makes_no_part_of_a_model_is_named_in_one_line(part, name, came):
  with pytest.raises(InputError) as error:
    make_recommender(RecommenderSettings(ITEMS, **{part: name}))
  expected = f"expected a function that makes a {part} of the settings (see bbqrec_jax/models/{part}s.py), got {came}"
  assert str(error.value).startswith(f"config field recommender.{part} = {name!r}: {expected}")
