"""A run from config to results: data, tokenizer, recommender, evaluation, each picked up where it was; and back."""

import copy
import dataclasses
import pathlib
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from bbqrec_jax.config import default_config, flatten, validate
from bbqrec_jax.data.dataset import Dataset, format_statistics, statistics
from bbqrec_jax.data.feature_store import FeatureStore, far_features
from bbqrec_jax.data.features import feature_widths, load_new_items
from bbqrec_jax.data.interactions import Split, leave_one_out
from bbqrec_jax.data.sources import load
from bbqrec_jax.errors import InputError
from bbqrec_jax.evaluation.ranking import WITHOUT_HISTORY, popularity_metrics
from bbqrec_jax.input_files import check_links, is_given
from bbqrec_jax.json_files import read_json, write_json
from bbqrec_jax.models.catalogue import Catalogue
from bbqrec_jax.models.recommender import Recommender
from bbqrec_jax.models.two_towers import make_recommender
from bbqrec_jax.parallel import Partitioner, make_partitioner
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.semantic_ids.repair import check_capacity
from bbqrec_jax.train.checkpointing import restore_state
from bbqrec_jax.train.logging import MetricsLog, say, warn
from bbqrec_jax.train.recommender_stage import (
  build_recommender,
  check_compared,
  check_content,
  check_fingerprint,
  expected_settings,
  id_length,
  initial_state,
  item_features,
  needs_features,
  needs_semantic_ids,
  run_recommender,
  tokenizer_folder,
)
from bbqrec_jax.train.state import TrainState
from bbqrec_jax.train.tokenizer_stage import run_tokenizer
from bbqrec_jax.workdir import (
  HASHES,
  REMAKE,
  check_workdir,
  claim,
  format_results,
  load_config,
  load_results,
  tokenizer_figure,
  with_absolute_paths,
)


def read_data(
  config: ml_collections.ConfigDict, *, for_tokenizer: bool = False
) -> tuple[Dataset, Split, dict[str, Any]]:
  """The data a config names, its split, and the figures that say which data it is.

  Args:
    config: of the run.
    for_tokenizer: whether a tokenizer is to be trained on it, whatever the recommender reads.

  Raises:
    InputError: if the data is missing or wrong, or lacks features or timestamps that the config reads.
  """
  dataset = load(config.data)
  if (for_tokenizer or needs_features(config)) and not dataset.modalities:
    raise InputError(
      f"{dataset.source}: this config reads items' features, found none: give NAME_features.npy of shape [items, width]"
      " or a NAME:float_seq column of the .item file (recbole), or take --config=configs/sasrec.py, which needs none"
    )
  if config.recommender.time_buckets and dataset.interactions.times is None:
    raise InputError(
      f"{dataset.source}: config field recommender.time_buckets = {config.recommender.time_buckets} needs timestamps,"
      " found none: give timestamps.txt (directory) or a timestamp:float column (recbole), or set it to 0"
    )
  if not config.recommender.time_buckets:
    dataset = dataclasses.replace(dataset, interactions=dataclasses.replace(dataset.interactions, times=None))
  split = leave_one_out(dataset.interactions)
  return dataset, split, statistics(dataset, split)


def _check_sizes(config: ml_collections.ConfigDict, *, num_items: int, num_modalities: int, num_devices: int) -> None:
  """Refuses what would only come to light hours into the run.

  Raises:
    InputError: if the items outnumber the semantic IDs, or a batch cannot be spread evenly over the devices.
  """
  if needs_semantic_ids(config) and not config.tokenizer.artefact:
    check_capacity(num_items, id_length(config, num_modalities), config.tokenizer.num_codes)
  flat = flatten(config)
  for name in ("tokenizer.batch_items", "tokenizer.batch_rows", "recommender.batch_rows", "evaluation.batch_size"):
    if flat[name] % num_devices:
      raise InputError(f"config field {name} = {flat[name]} must be a multiple of the {num_devices} devices")
  r = config.recommender
  if r.batch_rows % (num_devices * r.accumulation):
    raise InputError(
      f"config field recommender.batch_rows = {r.batch_rows} must be a multiple of the {num_devices} devices times"
      f" recommender.accumulation = {r.accumulation}"
    )


class _Run(NamedTuple):
  """What both stages of a run start from; `ids` are those of the artefact that the config names, if it does."""

  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  partitioner: Partitioner
  dataset: Dataset
  split: Split
  figures: dict[str, Any]
  ids: SemanticIds | None


def _begin(config: ml_collections.ConfigDict, workdir: pathlib.Path, *, for_tokenizer: bool = False) -> _Run:
  """Checks everything that can be checked before anything is computed, and shows the data."""
  validate(config)
  config = with_absolute_paths(config)
  check_workdir(workdir, config)
  partitioner = make_partitioner(config)
  dataset, split, figures = read_data(config, for_tokenizer=for_tokenizer)
  _check_sizes(
    config,
    num_items=dataset.num_items,
    num_modalities=len(dataset.modalities),
    num_devices=partitioner.num_devices,
  )
  ids = None
  if not is_given(workdir / "results.json"):  # A finished run needs none of it any more.
    if config.tokenizer.artefact:
      ids = _load_ids(config, workdir, figures, num_items=dataset.num_items)
    make_recommender(expected_settings(config, dataset, ids))
    if needs_semantic_ids(config):
      check_compared(config, ids, dataset.present, split.train)
  claim(workdir, config, figures)
  say(format_statistics(figures))
  return _Run(config, workdir, partitioner, dataset, split, figures, ids)


def _data_hash(figures: dict[str, Any]) -> str:
  """What semantic IDs are learned from."""
  return f"{figures['split_hash']} {figures['features_hash']}"


def _load_ids(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, figures: dict[str, Any], *, num_items: int
) -> SemanticIds:
  """The semantic IDs of a run.

  Raises:
    InputError: if they are not there, are of other data, or lack the content codes that the recommender reads.
  """
  folder = tokenizer_folder(config, workdir)
  ids = SemanticIds.load(folder)
  ids.check_data(_data_hash(figures), num_items=num_items, where=folder)
  check_content(config, ids)
  return ids


def _semantic_ids(run: _Run, log: MetricsLog) -> SemanticIds:
  """The semantic IDs that the run's config names, or those of its own tokenizer, trained if it is not yet."""
  folder = tokenizer_folder(run.config, run.workdir)
  if run.config.tokenizer.artefact or SemanticIds.exists(folder):
    ids = run.ids or _load_ids(run.config, run.workdir, run.figures, num_items=run.dataset.num_items)
    say(f"tokenizer: {folder} is there already, fingerprint {ids.fingerprint}")
    return ids
  return run_tokenizer(
    run.config,
    run.dataset,
    run.split,
    data_hash=_data_hash(run.figures),
    workdir=run.workdir,
    partitioner=run.partitioner,
    log=log,
  )


def tokenize(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Stage 1 alone: trains the tokenizer of a run, or goes on with it. `run` on the same workdir then does the rest.

  Returns:
    What `tokenizer/health.json` holds.

  Raises:
    InputError: as `run`.
  """
  prepared = _begin(config, workdir, for_tokenizer=True)
  log = MetricsLog(workdir)
  try:
    _semantic_ids(prepared, log)
  finally:
    log.close()
  return read_json(tokenizer_folder(prepared.config, workdir) / "health.json", mend=REMAKE)


def of_any_recommender(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The config with the recommender's defaults, for a tokenizer that several recommenders are to share."""
  neutral = copy.deepcopy(config)
  neutral.update_from_flattened_dict(flatten(default_config().recommender, "recommender."))
  return neutral


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Runs, or goes on with, what `config` describes.

  Args:
    config: a `default_config` with fields set.
    workdir: gets `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `tokenizer/` and `results.json`.

  Returns:
    What `results.json` holds.

  Raises:
    InputError: for anything wrong with the config, the data or the workdir, before anything is computed.
    Interrupted, Diverged, StorageError: as `train.loop.fit`.
  """
  prepared = _begin(config, workdir)
  config, dataset, split, figures = prepared.config, prepared.dataset, prepared.split, prepared.figures
  finished = workdir / "results.json"
  if is_given(finished):
    results = load_results(workdir)
    say(f"{finished} is there already: this run is done")
    say(format_results(results))
    return results

  log = MetricsLog(workdir)
  ids, seconds, skipped = None, 0.0, 0.0
  try:
    if needs_semantic_ids(config):
      ids = _semantic_ids(prepared, log)
      check_fingerprint(workdir, ids)
      if not config.tokenizer.artefact:
        seconds, skipped = (tokenizer_figure(workdir / "tokenizer", name) for name in ("seconds", "skipped_steps"))
    metrics, progress = run_recommender(
      config,
      ids,
      split,
      dataset,
      workdir=workdir,
      partitioner=prepared.partitioner,
      log=log,
    )
  finally:
    log.close()
  popularity = {
    "popularity" + suffix: popularity_metrics(
      split, split.test_target, num_items=dataset.num_items, histories=split.history("test") if suffix else None
    )
    for suffix in ("", WITHOUT_HISTORY)
  }
  results = {
    "model": f"{config.recommender.head} head",
    "data": {name: figures[name] for name in ("name", "source", "users", "items", "interactions", "split_hash")},
    **popularity,
    **metrics,
    "best_step": progress["best_step"],
    "steps": progress["step"],
    "skipped_steps": {"tokenizer": int(skipped), "recommender": progress["skipped"]},
    "seconds": {
      "tokenizer": seconds,
      "recommender": progress["training_seconds"],
      "evaluation": progress["evaluation_seconds"],
      "checkpoints": progress["checkpoint_seconds"],
    },
  }
  write_json(finished, results)
  say(format_results(results))
  return results


class Restored(NamedTuple):
  """A finished run, as far as ranking needs it.

  Attributes:
    dataset: its data.
    ids: its semantic IDs, those of new items at the end; None where it needs none.
    model: the recommender.
    params: the best ones by validation.
    catalogue: what the model is told of the items.
    config: of the run.
  """

  dataset: Dataset
  ids: SemanticIds | None
  model: Recommender
  params: Any
  catalogue: Catalogue
  config: ml_collections.ConfigDict


def _new_items(known: FeatureStore, folder: pathlib.Path) -> FeatureStore:
  """Items that came after the known ones, by the statistics of these; warns of what none of these can have had.

  Raises:
    InputError: if they are not there, or of other widths.
  """
  new = FeatureStore(*load_new_items(folder, feature_widths(known.features)), known.arrays())
  for sentence in far_features(new, num_known=known.num_items):
    warn(sentence)
  return new


def _extended(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  known: FeatureStore,
  ids: SemanticIds | None,
  tokenizer: pathlib.Path | None,
  folder: pathlib.Path | None,
) -> tuple[SemanticIds | None, FeatureStore | None, int]:
  """What a recommender is told of new items: IDs of all items, the new ones' features, and how many they are.

  Raises:
    InputError: if that is not what this recommender reads of an item.
  """
  reads_features = "features" in config.recommender.item_inputs
  if ids is None and not reads_features:
    raise InputError(f"{workdir}: its recommender knows items by number alone, and cannot take new ones")
  if ids is None and tokenizer is not None:
    raise InputError(f"{workdir}: its recommender reads no semantic IDs: give the new items' features alone")
  if ids is not None and tokenizer is None:
    raise InputError(
      f"{workdir}: its recommender reads semantic IDs: give those of the new items too (--tokenizer), made by"
      " bbqrec_jax.assign"
    )
  if reads_features and folder is None:
    raise InputError(f"{workdir}: its recommender reads features: give those of the new items too (--features)")
  new = _new_items(known, folder) if folder is not None else None
  counts = [] if new is None else [new.num_items]
  if ids is not None and tokenizer is not None:
    extended = SemanticIds.load(tokenizer)
    extended.check_extension(ids, where=tokenizer)
    ids = extended
    counts.append(len(ids.codes) - known.num_items)
  if len(set(counts)) > 1:
    raise InputError(f"{folder}: expected features of the {counts[1]} new items of {tokenizer}, got {counts[0]} rows")
  return ids, new, counts[0]


def _point_to_data(config: ml_collections.ConfigDict, workdir: pathlib.Path, data: pathlib.Path | None) -> None:
  """Sets where the data of a run is now, if that is told.

  Raises:
    InputError: if there is no such folder, or the data of this run is in none.
  """
  if config.data.source == "synthetic":
    if data is not None:
      raise InputError(f"--data={data}: the run in {workdir} makes its own data; leave --data out")
    return
  if data is not None:
    config.data.path = str(data)
  if not pathlib.Path(config.data.path).is_dir():
    raise InputError(
      f"{config.data.path}: expected the data of the run in {workdir}, found no such folder; say where it is now with"
      " --data=DIR"
    )


def restore(
  workdir: pathlib.Path,
  *,
  data: pathlib.Path | None = None,
  tokenizer: pathlib.Path | None = None,
  features: pathlib.Path | None = None,
  trusted: Collection[str] = (),
) -> Restored:
  """The best model of a finished workdir, of the items it was trained on or of more; none of its files is run.

  Args:
    workdir: of the run.
    data: the folder of its data, where that has moved since.
    tokenizer: semantic IDs that `bbqrec_jax.assign` extended by new items, for a recommender that reads IDs.
    features: the folder of the new items' features, as `assign` was given it, for one whose item inputs are "features".
    trusted: Python modules outside this project that the config may name its head and backbone from.

  Raises:
    InputError: if the run is not finished or its files do not fit one another, the data is not what it was trained on,
      the new items do not fit, or the config names code that is not trusted.
  """
  config = load_config(workdir, trusted=trusted)
  check_links(workdir)
  if not is_given(workdir / "results.json"):
    raise InputError(f"{workdir} holds no finished run (no results.json): start bbqrec_jax.main on it again")
  best = load_results(workdir)["best_step"]
  _point_to_data(config, workdir, data)
  dataset, split, figures = read_data(config)
  trained_on = read_json(workdir / "run.json")
  for name in HASHES:
    if trained_on.get(f"data {name}") != figures[name]:
      raise InputError(
        f"{dataset.source} has {name} {figures[name]}, the run in {workdir} was trained on"
        f" {trained_on.get(f'data {name}')}: give it its own data, --data=DIR"
      )
  ids = None
  if needs_semantic_ids(config):
    ids = _load_ids(config, workdir, figures, num_items=dataset.num_items)
    check_fingerprint(workdir, ids, trained=True)
  known = dataset.store
  rows = item_features(config, known)
  model, catalogue = build_recommender(config, ids, split.train, num_items=dataset.num_items, features=rows)
  like = _like(config, model, catalogue)
  if tokenizer is not None or features is not None:
    ids, new, count = _extended(workdir, config, known, ids, tokenizer, features)
    more = None if new is None else item_features(config, new)
    if rows is not None and more is not None:
      rows = np.concatenate([rows, more])
    _, catalogue = build_recommender(config, ids, split.train, num_items=dataset.num_items + count, features=rows)
    dataset = dataclasses.replace(dataset, titles=dataset.titles + ("",) * count)
  state = restore_state(workdir / "checkpoints" / "recommender", best, like, strict=not config.shard_rows)
  return Restored(dataset, ids, model, state.params, catalogue, config)


def _like(config: ml_collections.ConfigDict, model: Recommender, catalogue: Catalogue) -> TrainState:
  """Shapes and dtypes of the state that a config makes, on the first device; nothing is allocated."""
  where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  shapes = jax.eval_shape(lambda: initial_state(config, model, catalogue))
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes)
