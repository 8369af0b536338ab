"""A run from config to results: data, tokenizer, recommender, evaluation, each picked up where it was."""

import copy
import dataclasses
import pathlib
from typing import Any, NamedTuple

import ml_collections

from bbqrec_jax.config import default_config, flatten
from bbqrec_jax.data.dataset import Dataset, format_statistics, statistics
from bbqrec_jax.data.feature_store import squeezed_columns
from bbqrec_jax.data.features import feature_widths
from bbqrec_jax.data.interactions import Split, leave_one_out
from bbqrec_jax.data.sources import load
from bbqrec_jax.errors import InputError
from bbqrec_jax.evaluation.ranking import WITHOUT_HISTORY, popularity_metrics
from bbqrec_jax.input_files import is_given
from bbqrec_jax.json_files import read_json, write_json
from bbqrec_jax.models.tokenizer_loss import check_own_loss
from bbqrec_jax.models.two_towers import make_recommender
from bbqrec_jax.parallel import Partitioner, make_partitioner
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.semantic_ids.repair import check_capacity
from bbqrec_jax.train.catalogue import (
  check_compared,
  check_content,
  id_length,
  needs_features,
  needs_semantic_ids,
  recommender_settings,
)
from bbqrec_jax.train.logging import MetricsLog, say, warn
from bbqrec_jax.train.recommender_stage import check_fingerprint, run_recommender, tokenizer_folder
from bbqrec_jax.train.tokenizer_stage import run_tokenizer, tokenizer_settings
from bbqrec_jax.validation import validate
from bbqrec_jax.workdir import (
  REMAKE,
  check_workdir,
  claim,
  format_results,
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
  ids, finished = None, is_given(workdir / "results.json")
  if not finished:  # It needs none of it any more.
    if config.tokenizer.artefact:
      ids = load_ids(config, workdir, figures, num_items=dataset.num_items)
    elif for_tokenizer or needs_semantic_ids(config):
      t = config.tokenizer
      check_own_loss(t.own_loss, tokenizer_settings(config, dataset), batch_items=t.batch_items)
    settings = recommender_settings(
      config,
      ids,
      num_items=dataset.num_items,
      num_modalities=len(dataset.modalities),
      feature_width=sum(feature_widths(dataset.features).values()),
    )
    make_recommender(settings)
    if needs_semantic_ids(config):
      check_compared(config, ids, dataset.present, split.train)
  claim(workdir, config, figures)
  say(format_statistics(figures))
  if not finished and (for_tokenizer or needs_features(config)):
    for sentence in squeezed_columns(dataset.store):
      warn(sentence)
  return _Run(config, workdir, partitioner, dataset, split, figures, ids)


def _data_hash(figures: dict[str, Any]) -> str:
  """What semantic IDs are learned from."""
  return f"{figures['split_hash']} {figures['features_hash']}"


def load_ids(
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
    ids = run.ids or load_ids(run.config, run.workdir, run.figures, num_items=run.dataset.num_items)
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
