"""Stage 2 from histories and semantic IDs to a trained recommender."""

import pathlib
import time
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from bbqrec_jax import processes
from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.feature_store import FeatureStore
from bbqrec_jax.data.interactions import Interactions, Split, select_users
from bbqrec_jax.data.pipeline import PackedHistories, PrefixHistories, recommender_batches
from bbqrec_jax.errors import InputError
from bbqrec_jax.evaluation.ranking import WITHOUT_HISTORY, Ranking, evaluate, make_ranker, sample_users
from bbqrec_jax.input_files import is_given
from bbqrec_jax.json_files import read_json, write_json
from bbqrec_jax.models.catalogue import Catalogue, RecommenderSettings, code_columns
from bbqrec_jax.models.frozen import RQ_KMEANS
from bbqrec_jax.models.recommender import Recommender
from bbqrec_jax.models.two_towers import make_recommender
from bbqrec_jax.ops.ranking import LARGEST_CUTOFF
from bbqrec_jax.ops.similarity import equal_frequency_edges, equal_width_edges, overlap_edges, stream_pairs
from bbqrec_jax.parallel import Partitioner, made_on_host
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.semantic_ids.trie import build_trie
from bbqrec_jax.train.logging import MetricsLog, warn
from bbqrec_jax.train.loop import Plan, fit
from bbqrec_jax.train.optimizer import make_optimizer
from bbqrec_jax.train.state import TrainState
from bbqrec_jax.train.steps import make_recommender_step
from bbqrec_jax.train.watch import Safeguards


def needs_semantic_ids(config: Any) -> bool:
  """Whether anything in the recommender reads codes; SASRec, say, does not."""
  r = config.recommender
  codes = {"fused", "modalities", "content"} & set(r.item_inputs)
  return r.head != "dense" or r.backbone == "encoder_decoder" or bool(r.similarity) or bool(codes)


def needs_features(config: Any) -> bool:
  """Whether a run reads what is known of items' content: for semantic IDs, or in the recommender itself."""
  return needs_semantic_ids(config) or "features" in config.recommender.item_inputs


def id_length(config: Any, num_modalities: int) -> int:
  """Codes in an item's own ID, as the config's tokenizer makes it."""
  t = config.tokenizer
  return t.num_levels * (num_modalities if t.semantic_id == "concatenated" else 1) + (t.repair == "suffix")


def tokenizer_folder(config: Any, workdir: pathlib.Path) -> pathlib.Path:
  """Where a run's semantic IDs are: its own, or those that its config names."""
  return pathlib.Path(config.tokenizer.artefact) if config.tokenizer.artefact else workdir / "tokenizer"


def check_fingerprint(workdir: pathlib.Path, ids: SemanticIds, *, trained: bool = False) -> None:
  """Notes which semantic IDs a workdir's recommender reads, or makes sure that they are still the same.

  Args:
    workdir: of the run.
    ids: the tokenizer's semantic IDs.
    trained: whether the recommender is trained already, so that there must be a note.

  Raises:
    InputError: if it was trained on others (names both fingerprints), or the note is missing or is none.
  """
  path = workdir / "recommender.json"
  if not trained and not is_given(path):
    write_json(path, {"semantic_ids": ids.fingerprint})
    return
  trained_on = read_json(path).get("semantic_ids")
  if trained_on != ids.fingerprint:
    raise InputError(
      f"{workdir}: the recommender reads semantic IDs with fingerprint {trained_on}, the tokenizer's have"
      f" {ids.fingerprint}; give it back its own, or use another --workdir"
    )


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
  t = config.tokenizer
  shared = len(ids.codebooks) == 1 if ids is not None else t.codebooks != "per_stream" and t.quantizer != RQ_KMEANS
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
  if r.similarity_kind == "equal_width":
    return vectors, np.tile(equal_width_edges(r.num_buckets), (len(pairs), 1))
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
      names = " and ".join(dict.fromkeys(streams[index] for index in pair))
      raise InputError(
        f"no training history holds two items that both have {names}, so their similarity has no buckets; leave the"
        " modality out (data.modalities) or set recommender.similarity=()"
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


def item_features(config: Any, store: FeatureStore) -> np.ndarray | None:
  """The standardised features of a store's items, [n, F] float32, where the recommender reads them; otherwise None."""
  if "features" not in config.recommender.item_inputs:
    return None
  rows, _ = store.rows(np.arange(store.num_items))
  return np.concatenate(list(rows.values()), axis=1)


def check_content(config: Any, ids: SemanticIds) -> None:
  """Refuses IDs that lack the content codes which the recommender reads.

  Raises:
    InputError: if they do.
  """
  if "content" in config.recommender.item_inputs and ids.content is None:
    raise InputError(
      "config field recommender.item_inputs has content, but the semantic IDs came without content codes: train a"
      " tokenizer with tokenizer.content_codes = True"
    )


def expected_settings(config: Any, dataset: Dataset, ids: SemanticIds | None) -> RecommenderSettings:
  """The settings that `build_catalogue` will come to; where a tokenizer is still to be trained, `ids` are None."""
  r, t = config.recommender, config.tokenizer
  num_modalities, widths = len(dataset.modalities), [array.shape[1] for array in dataset.features.values()]
  length, levels, codes = id_length(config, num_modalities), t.num_levels, t.num_codes
  if ids is not None:
    length, levels, codes = ids.codes.shape[1], ids.stream_codes.shape[2], ids.num_codes
  if not needs_semantic_ids(config):
    length = codes = 0
  columns = {"fused": length, "modalities": num_modalities * levels, "content": (num_modalities + 1) * levels}
  edges = 2 * levels if r.similarity_kind == "overlap" else r.num_buckets - 1
  return recommender_settings(
    config,
    num_items=dataset.num_items,
    num_levels=length,
    num_codes=codes,
    num_columns=sum(columns.get(name, 0) for name in r.item_inputs),
    num_streams=sum({"modalities": num_modalities, "fused": 1}[name] for name in r.similarity),
    cross_pairs=compares_streams(config, ids),
    num_edges=edges if r.similarity else 0,
    feature_width=sum(widths) if "features" in r.item_inputs else 0,
  )


def recommender_settings(
  config: Any,
  *,
  num_items: int,
  num_levels: int,
  num_codes: int,
  num_columns: int,
  num_streams: int,
  cross_pairs: bool,
  num_edges: int,
  feature_width: int,
) -> RecommenderSettings:
  """The settings of a config's recommender, whose shapes are given; `num_edges` are those between buckets."""
  r = config.recommender
  return RecommenderSettings(
    num_items=num_items,
    num_levels=num_levels,
    num_codes=num_codes,
    num_columns=num_columns,
    item_embedding="item" in r.item_inputs,
    feature_width=feature_width,
    backbone=r.backbone,
    head=r.head,
    width=r.width,
    num_layers=r.num_layers,
    num_heads=r.num_heads,
    head_width=r.head_width,
    positions=r.positions,
    position_buckets=r.position_buckets,
    time_buckets=r.time_buckets,
    mlp_width=r.mlp_width,
    depth_layers=r.depth_layers,
    dropout=r.dropout,
    item_dropout=r.item_dropout,
    max_length=r.max_length,
    num_streams=num_streams,
    cross_pairs=cross_pairs,
    num_buckets=0 if r.similarity_kind == "continuous" else num_edges + 1,
    layer_tables=r.layer_tables,
    multiply_bias=r.multiply_bias,
    attention=r.attention,
    num_negatives=r.num_negatives,
    softmax_over=r.softmax_over,
    rerank=r.rerank,
    generative_weight=r.generative_weight,
    dense_width=r.dense_tower.width if r.head == "hybrid" else 0,
    dense_mlp_width=r.dense_tower.mlp_width,
    dense_dropout=r.dense_tower.dropout,
    node_scores=r.node_scores,
    history_offsets=r.history_offsets,
    dtype=r.dtype,
  )


def build_catalogue(
  config: Any,
  ids: SemanticIds | None,
  histories: Interactions,
  *,
  num_items: int,
  features: np.ndarray | None = None,
) -> tuple[Catalogue, RecommenderSettings]:
  """What the model is told about items, and the shapes that follow from it.

  Args:
    config: of the run.
    ids: the tokenizer's semantic IDs; None where the recommender needs none.
    histories: the training histories, for the bucket edges.
    num_items: N.
    features: of all items, as `item_features` gives them.
  """
  r = config.recommender
  streams = similarity_streams(config, ids)
  cross = compares_streams(config, ids)
  pairs = stream_pairs(len(streams), cross=cross)
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
    if "content" in r.item_inputs:
      check_content(config, ids)
      assert ids.content is not None
      sources += zip(ids.content.stream_codes, ids.content.present, strict=True)
    if sources:
      codes, present = zip(*sources, strict=True)
      columns = code_columns(list(codes), list(present), num_codes=ids.num_codes)
  if ids is not None and streams:
    compared, edges = comparison(config, ids, histories, streams, pairs)
  settings = recommender_settings(
    config,
    num_items=num_items,
    num_levels=semantic_ids.shape[1],
    num_codes=0 if ids is None else ids.num_codes,
    num_columns=columns.shape[1],
    num_streams=len(streams),
    cross_pairs=cross,
    num_edges=edges.shape[1],
    feature_width=0 if features is None else features.shape[1],
  )
  trie = build_trie(semantic_ids) if r.head != "dense" else None
  catalogue = Catalogue(
    semantic_ids=jnp.asarray(semantic_ids),
    columns=jnp.asarray(columns),
    streams=jnp.asarray(compared),
    edges=jnp.asarray(edges),
    features=None if features is None else jnp.asarray(features),
    trie=trie,
  )
  return catalogue, settings


def build_recommender(
  config: Any, ids: SemanticIds | None, histories: Interactions, *, num_items: int, features: np.ndarray | None = None
) -> tuple[Recommender, Catalogue]:
  """The model, and the catalogue it reads; the arguments are those of `build_catalogue`."""
  catalogue, settings = build_catalogue(config, ids, histories, num_items=num_items, features=features)
  return make_recommender(settings), catalogue


def initial_state(config: Any, model: Recommender, catalogue: Catalogue) -> TrainState:
  """The state before the first step; of the catalogue the shapes are enough."""
  example = {name: jnp.zeros((1, 2), jnp.int32) for name in ("items", "targets", "segments", "positions", "times")}
  if config.recommender.backbone == "encoder_decoder":
    example["targets"] = jnp.zeros(1, jnp.int32)
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (catalogue, example))
  params = model.lazy_init(jax.random.key(config.seed), *shapes)["params"]
  optimizer = make_optimizer(config.recommender.optimizer, total_steps=config.recommender.steps)
  return TrainState.create(params, optimizer, seed=config.seed)


def training_batches(config: Any, histories: Interactions) -> grain.IterDataset:
  """The input pipeline of the recommender that a config describes."""
  r = config.recommender
  shape = {"batch_rows": r.batch_rows, "max_length": r.max_length, "seed": config.seed}
  shape |= {"process_index": jax.process_index(), "process_count": jax.process_count()}
  if r.backbone == "encoder_decoder":
    return recommender_batches(PrefixHistories(histories, bounds=tuple(r.length_buckets), **shape))
  return recommender_batches(PackedHistories(histories, row_length=r.row_length, whole=False, **shape))


def run_recommender(
  config: Any,
  ids: SemanticIds | None,
  split: Split,
  dataset: Dataset,
  *,
  workdir: pathlib.Path,
  partitioner: Partitioner,
  log: MetricsLog,
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
  """Trains the recommender (or goes on with it), picks it by validation NDCG@10, ranks the test items once.

  The rank of each user's validation and test item, in the order of the users, goes into `workdir/ranks.npz`.

  Returns:
    ({"validation": metrics, "test": metrics} of the best model on all users, and the same with `WITHOUT_HISTORY` after
    the names, where no user's own history is ranked; the loop's progress record).
  """
  r, e = config.recommender, config.evaluation
  with made_on_host():
    features = item_features(config, dataset.store)
    model, catalogue = build_recommender(config, ids, split.train, num_items=dataset.num_items, features=features)
  if not model.exact and e.beam_width < min(LARGEST_CUTOFF, catalogue.num_items):
    warn(
      f"config field evaluation.beam_width = {e.beam_width}: what stands further back counts as a miss, so figures at"
      f" higher cutoffs, up to {LARGEST_CUTOFF}, are too low"
    )
  ranker = partitioner.compile_map(make_ranker(model, beam_width=e.beam_width))
  shared = partitioner.place(catalogue)
  some = sample_users(split, e.validation_users, seed=config.seed)
  some_histories = select_users(split.train, some)

  def rank(
    params: Any, stage_histories: Interactions, targets: np.ndarray, *, exclude_history: bool = False
  ) -> Ranking:
    return evaluate(
      ranker,
      params,
      shared,
      stage_histories,
      targets,
      batch_size=e.batch_size,
      max_length=r.max_length,
      num_items=catalogue.num_items,
      bounds=tuple(r.length_buckets),
      exclude_history=exclude_history,
    )

  plan = Plan(
    name="recommender",
    steps=r.steps,
    log_every=config.log_every,
    evaluate_every=r.evaluate_every,
    evaluate=lambda state: rank(state.params, some_histories, split.validation_target[some]).metrics,
    select="ndcg@10",
    patience=r.patience,
    safeguards=Safeguards.of(config),
  )
  optimizer = make_optimizer(r.optimizer, total_steps=r.steps)
  state, progress = fit(
    plan,
    partitioner.create(lambda: initial_state(config, model, catalogue)),
    shared,
    make_recommender_step(model, optimizer, accumulation=r.accumulation),
    training_batches(config, split.train),
    partitioner=partitioner,
    directory=workdir / "checkpoints" / "recommender",
    log=log,
  )
  started = time.monotonic()
  rankings = {
    part + suffix: rank(state.params, split.history(part), targets, exclude_history=bool(suffix))
    for suffix in ("", WITHOUT_HISTORY)
    for part, targets in (("validation", split.validation_target), ("test", split.test_target))
  }
  progress["evaluation_seconds"] += time.monotonic() - started
  ranks: dict[str, Any] = {name: ranking.ranks for name, ranking in rankings.items()}
  if processes.is_first():
    np.savez(workdir / "ranks.npz", **ranks)
  return {name: ranking.metrics for name, ranking in rankings.items()}, progress
