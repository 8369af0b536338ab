"""What a recommender is told of the items, made from a config, semantic IDs and training histories."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from bbqrec_jax.data.feature_store import FeatureStore
from bbqrec_jax.data.interactions import Interactions
from bbqrec_jax.errors import InputError
from bbqrec_jax.ops.similarity import equal_frequency_edges, overlap_edges, stream_pairs
from bbqrec_jax.recommender.candidate_similarity import build_streams
from bbqrec_jax.recommender.catalogue import Catalogue, code_columns
from bbqrec_jax.recommender.settings import RecommenderSettings, needs_semantic_ids, parts_of, trains_tokenizer
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.semantic_ids.trie import build_trie
from bbqrec_jax.tokenizer.quantizers import make_quantizer
from bbqrec_jax.tokenizer.settings import unchecked_settings
from bbqrec_jax.utils.settings import from_config


def id_length(config: Any, num_modalities: int) -> int:
  """Codes in an item's own ID, as the config's tokenizer makes it."""
  t = config.tokenizer
  return t.num_levels * (num_modalities if t.semantic_id == "concatenated" else 1) + (t.repair == "suffix")


def similarity_streams(config: Any, ids: SemanticIds | None) -> tuple[str, ...]:
  """The streams whose similarities reweight attention, in order."""
  if ids is None or not config.recommender.similarity:
    return ()
  chosen = ids.modalities if "modalities" in config.recommender.similarity else ()
  return chosen + (("fused",) if "fused" in config.recommender.similarity else ())


def compares_streams(config: Any, ids: SemanticIds | None) -> bool:
  """Whether streams are compared with one another: not where their vectors are of different codebooks.

  Where a tokenizer is still to be trained, `ids` are None.
  """
  if ids is not None:
    shared = len(ids.codebooks) == 1
  else:
    shared = not trains_tokenizer(config) or make_quantizer(unchecked_settings(config)).shared
  return bool(config.recommender.cross_pairs and shared)


def sampled_similarities(
  vectors: np.ndarray, histories: Interactions, pairs: tuple[tuple[int, int], ...], *, max_length: int, seed: int
) -> list[np.ndarray]:
  """Similarities of random pairs of items that stand in one training history, for the bucket edges.

  Args:
    vectors: [N, S, d]; zero rows where a stream is absent.
    histories: the training histories, of which the last `max_length` items count.
    pairs: the stream pairs.
    max_length: T.
    seed: of the draw.

  Returns:
    For each pair of streams, the similarities [n] of those item pairs that have both.
  """
  rng = np.random.default_rng(seed)
  lengths = np.minimum(histories.lengths, max_length)
  # A history of n items has n (n - 1) / 2 pairs: draw users in that proportion, then two places in each.
  weight = lengths * (lengths - 1.0)
  if not weight.any():
    return [np.zeros(0, np.float32) for _ in pairs]
  users = rng.choice(len(lengths), 200_000, p=weight / weight.sum())
  first = rng.integers(0, lengths[users])
  second = (first + rng.integers(1, lengths[users])) % lengths[users]
  start = histories.offsets[1:][users] - lengths[users]
  a, b = histories.items[start + first], histories.items[start + second]
  norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
  unit = np.divide(vectors, norm, out=np.zeros_like(vectors), where=norm > 0)
  here = norm[..., 0] > 0
  samples = []
  for m, n in pairs:
    both = here[a, m] & here[b, n] & here[a, n] & here[b, m]
    left, right = a[both], b[both]
    forward = np.einsum("nd,nd->n", unit[left, m], unit[right, n])
    backward = np.einsum("nd,nd->n", unit[left, n], unit[right, m])
    samples.append(0.5 * (forward + backward))
  return samples


def comparison(
  config: Any,
  ids: SemanticIds,
  histories: Interactions,
  streams: tuple[str, ...],
  pairs: tuple[tuple[int, int], ...],
) -> tuple[np.ndarray, np.ndarray]:
  """What items are compared by, and where buckets of their similarities end.

  Args:
    config: of the run.
    ids: the tokenizer's semantic IDs.
    histories: the training histories, which equal-frequency buckets are fitted on.
    streams: names of the S streams.
    pairs: the P stream pairs.

  Returns:
    streams [N, S, ...] and edges [P, n_buckets - 1] as a `Catalogue` has them; no edges where the bias is continuous.

  Raises:
    InputError: if no training history holds two items that have both streams of a pair.
  """
  r = config.recommender
  if r.similarity_kind == "overlap":
    chosen = [ids.streams.index(name) for name in streams]
    codes = np.where(ids.present[chosen][..., None], ids.stream_codes[chosen], -1)
    edges = np.tile(overlap_edges(codes.shape[2]), (len(pairs), 1))
    return np.swapaxes(codes, 0, 1).astype(np.int32), edges
  vectors = np.stack([ids.vectors(name) for name in streams], axis=1)
  if r.similarity_kind == "continuous":
    return vectors, np.zeros((len(pairs), 0), np.float32)
  samples = _some_of_each(config, vectors, histories, streams, pairs)
  return vectors, np.stack([equal_frequency_edges(sample, r.num_buckets) for sample in samples])


def _some_of_each(
  config: Any,
  vectors: np.ndarray,
  histories: Interactions,
  streams: tuple[str, ...],
  pairs: tuple[tuple[int, int], ...],
) -> list[np.ndarray]:
  """`sampled_similarities`, none of them empty.

  Raises:
    InputError: if there is nothing to compare of a pair of streams.
  """
  samples = sampled_similarities(vectors, histories, pairs, max_length=config.recommender.max_length, seed=config.seed)
  for pair, sample in zip(pairs, samples, strict=True):
    if not len(sample):
      names = list(dict.fromkeys(streams[index] for index in pair))
      others = [name for name in streams if name not in (names[-1], "fused")]
      ways = [f"leave {names[-1]} out (data.modalities={','.join(others)})"] if others else []
      ways += ["set recommender.cross_pairs=False"] if len(names) > 1 else []
      raise InputError(
        f"no training history holds two items that both have {' and '.join(names)}, so their similarity has no buckets;"
        f" {', '.join([*ways, 'set recommender.similarity=()'])} or choose another recommender.similarity_kind"
      )
  return samples


def check_compared(
  config: Any, ids: SemanticIds | None, present: dict[str, np.ndarray], histories: Interactions
) -> None:
  """Refuses, before any tokenizer is trained, modalities whose similarities would have no buckets.

  Args:
    config: of the run.
    ids: its semantic IDs, if they are there already.
    present: which items have each modality, [N] bool.
    histories: the training histories.

  Raises:
    InputError: if no training history holds two items that have a modality, or two of them.
  """
  r, names = config.recommender, tuple(present)
  if "modalities" not in r.similarity or r.similarity_kind != "equal_frequency":
    return
  vectors = np.stack(list(present.values()), axis=1)[..., None].astype(np.float32)
  _some_of_each(config, vectors, histories, names, stream_pairs(len(names), cross=compares_streams(config, ids)))


def item_features(config: Any, store: FeatureStore) -> dict[str, np.ndarray]:
  """Each modality's standardised features of a store's items, [n, D] float32, where the recommender reads them."""
  r = config.recommender
  if "features" not in {*r.item_inputs, *r.candidate_similarity.streams}:
    return {}
  rows, _ = store.rows(np.arange(store.num_items))
  return rows


def recommender_settings(
  config: Any, ids: SemanticIds | None, *, num_items: int, num_modalities: int, feature_widths: Sequence[int]
) -> RecommenderSettings:
  """The settings of the recommender that a config describes, with the shapes that follow from its data.

  Args:
    config: of the run.
    ids: its semantic IDs; None where it needs none, or they are still to be made, as the config says.
    num_items: N.
    num_modalities: that semantic IDs are made of.
    feature_widths: D of each modality of the data.
  """
  r, t = config.recommender, config.tokenizer
  length, levels, codes = id_length(config, num_modalities), t.num_levels, t.num_codes
  if ids is not None:
    length, levels, codes = ids.codes.shape[1], ids.stream_codes.shape[2], ids.num_codes
  if not needs_semantic_ids(config):
    length = codes = 0
  columns = {"fused": length, "modalities": num_modalities * levels}
  buckets = 2 * levels + 1 if r.similarity_kind == "overlap" else r.num_buckets
  return dataclasses.replace(
    from_config(RecommenderSettings, r, prefix="recommender."),
    num_items=num_items,
    num_levels=length,
    num_codes=codes,
    num_columns=sum(columns.get(name, 0) for name in r.item_inputs),
    feature_width=sum(feature_widths) if "features" in r.item_inputs else 0,
    num_streams=sum({"modalities": num_modalities, "fused": 1}[name] for name in r.similarity),
    candidate_vectors=sum(
      {"features": len(feature_widths), "modalities": num_modalities, "fused": 1, "behaviour": 0}[name]
      for name in r.candidate_similarity.streams
    ),
    cross_streams=compares_streams(config, ids),
    table_buckets=buckets if r.similarity and r.similarity_kind != "continuous" else 0,
  )


def build_catalogue(
  config: Any,
  ids: SemanticIds | None,
  histories: Interactions,
  *,
  num_items: int,
  features: dict[str, np.ndarray] | None = None,
  titles: Sequence[str] = (),
) -> tuple[Catalogue, RecommenderSettings]:
  """What the model is told about items, and the shapes that follow from it.

  Args:
    config: of the run.
    ids: the tokenizer's semantic IDs; None where the recommender needs none.
    histories: the training histories, for the bucket edges and for what stands near what.
    num_items: N.
    features: of all items, as `item_features` gives them.
    titles: of all items; () where there are none.
  """
  r, features = config.recommender, features or {}
  settings = recommender_settings(
    config,
    ids,
    num_items=num_items,
    num_modalities=0 if ids is None else len(ids.modalities),
    feature_widths=[rows.shape[1] for rows in features.values()],
  )
  columns = np.zeros((num_items, 0), np.int32)
  semantic_ids = np.zeros((num_items, 0), np.int32)
  compared = np.zeros((num_items, 0, 1), np.float32)
  edges = np.zeros((0, 0), np.float32)
  if ids is not None:
    semantic_ids = ids.codes
    sources = [(ids.codes, np.ones(num_items, bool))] if "fused" in r.item_inputs else []
    if "modalities" in r.item_inputs:
      indices = [ids.streams.index(name) for name in ids.modalities]
      sources += [(ids.stream_codes[index], ids.present[index]) for index in indices]
    if sources:
      codes, present = zip(*sources, strict=True)
      columns = code_columns(list(codes), list(present), num_codes=ids.num_codes)
  if ids is not None and settings.num_streams:
    compared, edges = comparison(config, ids, histories, similarity_streams(config, ids), settings.pairs)
  trie = build_trie(semantic_ids) if any(head.reads_codes for head in parts_of(r)[1]) else None
  compare, candidates = r.candidate_similarity, None
  if compare.streams:
    candidates = build_streams(compare, ids, features, histories, num_items=num_items, seed=config.seed, titles=titles)
  read = settings.feature_width > 0
  catalogue = Catalogue(
    semantic_ids=jnp.asarray(semantic_ids),
    columns=jnp.asarray(columns),
    streams=jnp.asarray(compared),
    edges=jnp.asarray(edges),
    features=jnp.asarray(np.concatenate(list(features.values()), axis=1)) if read else None,
    trie=trie,
    candidates=candidates,
  )
  return catalogue, settings
