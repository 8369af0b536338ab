"""A run from config to results: data, tokenizer, recommender, evaluation; each stage resumes where it stopped."""

import contextlib
import copy
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_collections

from bbqrec_jax.config import default_config, read_config
from bbqrec_jax.data.dataset import Dataset, format_statistics, statistics
from bbqrec_jax.data.feature_store import squeezed_columns
from bbqrec_jax.data.features import feature_widths
from bbqrec_jax.data.interactions import MINIMUM_LENGTH, Split, without_times
from bbqrec_jax.data.sources import load, split_of
from bbqrec_jax.errors import InputError
from bbqrec_jax.recommender.evaluate import WITHOUT_HISTORY, popularity_metrics
from bbqrec_jax.recommender.items import check_compared, id_length, recommender_settings
from bbqrec_jax.recommender.settings import needs_features, needs_semantic_ids, reads_titles, trains_tokenizer
from bbqrec_jax.recommender.train import check_fingerprint, held_out, run_recommender, tokenizer_folder
from bbqrec_jax.recommender.two_towers import make_recommender
from bbqrec_jax.runs import nightly
from bbqrec_jax.runs.steps import check_recipe, take_steps
from bbqrec_jax.runs.tracking import write_board
from bbqrec_jax.runs.workdir import (
  REMAKE,
  check_workdir,
  claimed,
  format_results,
  load_results,
  tokenizer_figure,
  with_absolute_paths,
)
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.semantic_ids.repair import check_capacity
from bbqrec_jax.tokenizer.kmeans import check_varied
from bbqrec_jax.tokenizer.parts import try_parts
from bbqrec_jax.tokenizer.quantizers import make_quantizer
from bbqrec_jax.tokenizer.train import run_tokenizer, tokenizer_settings
from bbqrec_jax.training.logging import MetricsLog
from bbqrec_jax.training.partitioning import Partitioner, make_partitioner
from bbqrec_jax.utils import processes, remote
from bbqrec_jax.utils.files import is_given, local_path
from bbqrec_jax.utils.json_files import read_json, write_json
from bbqrec_jax.utils.messages import say, warn
from bbqrec_jax.utils.settings import flatten


def read_data(
  config: ml_collections.ConfigDict, *, for_tokenizer: bool = False, given: Dataset | None = None
) -> tuple[Dataset, Split, dict[str, Any]]:
  """The data a config names, its split, and the figures that say which data it is.

  Args:
    config: of the run.
    for_tokenizer: whether a tokenizer is to be trained on it, whatever the recommender reads.
    given: the data itself, where the config's source is "memory".

  Raises:
    InputError: if the data is missing or wrong, has no history to learn from, or lacks features or timestamps that the
      config reads.
  """
  dataset = load(config.data, given)
  held_out = 2 if config.data.split == "leave_one_out" else 0
  if dataset.interactions.lengths.max() < held_out + 2:
    file = {"directory": "sequences.txt", "recbole": f"{dataset.name}.inter"}.get(config.data.source, "")
    left = ", without the incomplete items," if config.data.drop_incomplete_items else ""
    held = ", of which two are to validate and to test on," if held_out else ""
    where = os.path.join(dataset.source, file).rstrip("/")
    raise InputError(
      f"{where}: the histories{left} are too short to learn from: expected some of"
      f" {held_out + 2} or more items{held} as nothing follows a single one, found none; give longer histories"
    )
  if (for_tokenizer or needs_features(config)) and not dataset.modalities:
    without = "" if for_tokenizer else ", or take --config=sasrec, which needs none"
    raise InputError(
      f"{dataset.source}: this config reads items' features, found none: bbqrec features makes them of what items.jsonl"
      f" says, or give NAME_features.npy of shape [items, width] or a NAME:float_seq column of the .item file (recbole)"
      f"{without}"
    )
  if config.recommender.time_buckets and dataset.interactions.times is None:
    raise InputError(
      f"{dataset.source}: config field recommender.time_buckets = {config.recommender.time_buckets} needs timestamps,"
      " found none: give timestamps.txt (directory) or a timestamp:float column (recbole), or set it to 0"
    )
  split = split_of(config.data, dataset.interactions)
  if not config.recommender.time_buckets:
    dataset = dataclasses.replace(dataset, interactions=dataclasses.replace(dataset.interactions, times=None))
    split = without_times(split)
  figures = statistics(dataset, split)
  if not reads_titles(config.recommender.candidate_similarity):
    figures["titles_hash"] = None  # They are shown, and change no number.
  return dataset, split, figures


def _check_stages(
  config: ml_collections.ConfigDict, dataset: Dataset, *, num_devices: int, tokenizer_alone: bool
) -> None:
  """Refuses, of the stages that are to be trained, what would only come to light hours into the run.

  Raises:
    InputError: if the items outnumber the semantic IDs, there is nothing to tell them apart by, a custom part
      of the tokenizer breaks its contract, or one of its batches cannot be spread evenly over the devices.
  """
  t, batches = config.tokenizer, []
  if trains_tokenizer(config, alone=tokenizer_alone):
    check_capacity(dataset.num_items, id_length(config, len(dataset.modalities)), t.num_codes)
    settings = tokenizer_settings(config, dataset)
    try_parts(settings, batch_items=t.batch_items)
    if not make_quantizer(settings).trained:
      check_varied(dataset)
    else:
      batches += [("tokenizer.batch_items", t.batch_items), ("tokenizer.batch_rows", t.batch_rows)]
  wrong = [
    f"{name} = {rows} must be a multiple of the {num_devices} devices" for name, rows in batches if rows % num_devices
  ]
  if wrong:
    raise InputError(f"config field {', '.join(wrong)}; correct it, or use one device (partitioner = 'single')")


def _shorten_warmup(config: ml_collections.ConfigDict) -> None:
  """Lets the tokenizer's warm-up end within a run that was made shorter, with a warning."""
  t = config.tokenizer
  if type(t.steps) is int and type(t.warmup_steps) is int and 0 < t.steps <= t.warmup_steps:
    warn(
      f"tokenizer.warmup_steps = {t.warmup_steps} is no less than tokenizer.steps = {t.steps}: {t.steps // 4} are taken"
    )
    t.warmup_steps = t.steps // 4


def _fewer_codes(config: ml_collections.ConfigDict, num_items: int) -> None:
  """Lowers the number of codes where nobody has chosen it and the items are too few to share them, with a warning."""
  t = config.tokenizer
  codes = max(2, 1 << (max(1, num_items // 4).bit_length() - 1))
  unchosen = t.num_codes == default_config().tokenizer.num_codes
  if unchosen and t.num_codes > num_items // 2 and codes**t.num_levels >= num_items:
    warn(f"tokenizer.num_codes = {t.num_codes} are too many for {num_items} items to share: {codes} are taken")
    t.num_codes = codes


def _without_candidate_similarity(config: ml_collections.ConfigDict, split: Split) -> None:
  """Leaves candidate similarity out, with a warning, where no history is long enough to fit it on."""
  if config.recommender.candidate_similarity.streams and split.train.lengths.max() < 3:
    warn(
      "recommender.candidate_similarity is left out: it is fitted on each user's last training transition, before which"
      f" there is nothing to learn from; give some users {MINIMUM_LENGTH + 2} items or more"
    )
    config.recommender.candidate_similarity.streams = ()


class _Run(NamedTuple):
  """What both stages of a run start from; `ids` are of the artefact, `earlier` is the run, that the config names."""

  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  partitioner: Partitioner
  dataset: Dataset
  split: Split
  figures: dict[str, Any]
  ids: SemanticIds | None
  earlier: nightly.Earlier | None


@contextlib.contextmanager
def _begun(
  config: ml_collections.ConfigDict,
  workdir: str | pathlib.Path,
  given: Dataset | None = None,
  *,
  tokenizer_alone: bool = False,
) -> Iterator[_Run]:
  """Checks everything that can be checked before anything is computed, takes the workdir, and shows the data."""
  missing = [name for name in ("data", "tokenizer", "recommender", "evaluation") if name not in config]
  if missing:
    raise InputError(f"the config has no {', '.join(missing)}: expected that of a run, as `default_config` begins it")
  config = with_absolute_paths(config)
  own_tokenizer = tokenizer_alone or trains_tokenizer(config)
  if own_tokenizer:
    _shorten_warmup(config)
  if config.data.split == "none":
    if config.steps_of:
      take_steps(config)
    if not config.recommender.steps:
      raise InputError(
        "config field data.split = 'none' leaves nothing to stop by: set steps_of to the workdir of a validated run, or"
        " recommender.steps"
      )
    # The last step is the best one: what is ranked was learned from, and tells no better.
    config.recommender.evaluate_every = config.recommender.steps
    config.tokenizer.evaluate_every = config.tokenizer.steps
    warn("data.split = 'none': figures are of what was learned from")
  read_config(config, tokenizer_alone=tokenizer_alone)
  workdir = local_path(workdir, flag="workdir", use="run")
  with remote.mirrored(workdir):
    check_workdir(workdir, config)
    partitioner = make_partitioner(config)
    dataset, split, figures = read_data(config, for_tokenizer=tokenizer_alone, given=given)
    if not tokenizer_alone:
      _without_candidate_similarity(config, split)
    if own_tokenizer:
      _fewer_codes(config, dataset.num_items)
    ids, earlier = None, None
    done = is_given(workdir / "results.json") or (tokenizer_alone and SemanticIds.exists(workdir / "tokenizer"))
    if not done:  # What is done needs none of it any more.
      if config.steps_of:
        check_recipe(config)
      _check_stages(config, dataset, num_devices=partitioner.num_devices, tokenizer_alone=tokenizer_alone)
      if config.init_from:
        earlier = nightly.read_earlier(local_path(config.init_from, flag="config.init_from", use="read"), dataset)
      if config.tokenizer.artefact:
        ids = load_ids(config, workdir, dataset, figures)
      if not tokenizer_alone:
        settings = recommender_settings(
          config,
          ids,
          num_items=dataset.num_items,
          num_modalities=len(dataset.modalities),
          feature_widths=list(feature_widths(dataset.features).values()),
        )
        make_recommender(settings)
        if needs_semantic_ids(config):
          check_compared(config, ids, dataset.present, split.train)
    with claimed(workdir, config, figures, dataset, split.train, done=done):
      remote.keep(workdir, optional=done)
      say(format_statistics(figures))
      if not done and (tokenizer_alone or needs_features(config)):
        for sentence in squeezed_columns(dataset.store):
          warn(sentence)
      if earlier is not None:
        say(nightly.describe(earlier, dataset))
        if learned := nightly.learned_before(earlier, split.train):
          warn(
            f"{earlier.workdir} has learned more interactions of {learned:,} users than are learned from now: what is"
            " held out of them may be among these, and figures then say too much"
          )
      yield _Run(config, workdir, partitioner, dataset, split, figures, ids, earlier)


def _data_hash(figures: dict[str, Any]) -> str:
  """What semantic IDs are learned from."""
  return f"{figures['split_hash']} {figures['features_hash']}"


def load_ids(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, dataset: Dataset, figures: dict[str, Any]
) -> SemanticIds:
  """The semantic IDs of a run on a data set, whose `statistics` are the figures.

  Raises:
    InputError: if they are not there, or are of other data.
  """
  folder = tokenizer_folder(config, workdir)
  ids = SemanticIds.load(folder)
  ids.check_data(_data_hash(figures), item_ids=dataset.item_ids, where=folder)
  return ids


def _semantic_ids(run: _Run) -> SemanticIds:
  """The semantic IDs that the run's config names, or those of its own tokenizer, trained if it is not yet."""
  folder = tokenizer_folder(run.config, run.workdir)
  if run.config.tokenizer.artefact or SemanticIds.exists(folder):
    ids = run.ids or load_ids(run.config, run.workdir, run.dataset, run.figures)
    say(f"tokenizer: {folder} is there already, fingerprint {ids.fingerprint}")
    return ids
  if run.earlier is not None:
    return nightly.make_ids(run.earlier, run.dataset, folder, data_hash=_data_hash(run.figures))
  split = run.split
  if run.config.tokenizer.hold_out_last:
    held, _ = held_out(run.config, split)
    if held.train.lengths.max() >= 2:
      split = dataclasses.replace(split, train=held.train)
  with contextlib.closing(MetricsLog(run.workdir)) as log:
    return run_tokenizer(
      run.config,
      run.dataset,
      split,
      data_hash=_data_hash(run.figures),
      workdir=run.workdir,
      partitioner=run.partitioner,
      log=log,
    )


def tokenize(
  config: ml_collections.ConfigDict, workdir: str | pathlib.Path, given: Dataset | None = None
) -> dict[str, Any]:
  """Stage 1 alone: trains the tokenizer of a run, or goes on with it. `run` on the same workdir then does the rest.

  Args:
    config: as for `run`, and so are the others.
    workdir: see there.
    given: see there.

  Returns:
    What `tokenizer/health.json` holds.

  Raises:
    InputError: as `run`.
  """
  with _begun(config, workdir, given, tokenizer_alone=True) as prepared:
    _semantic_ids(prepared)
    return read_json(tokenizer_folder(prepared.config, prepared.workdir) / "health.json", mend=REMAKE)


def of_any_recommender(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The config with the defaults of recommender and evaluation, for a tokenizer that several recommenders share.

  Which transitions are held out stays, as the tokenizer is not to see them either.
  """
  neutral = copy.deepcopy(config)
  for section in ("recommender", "evaluation"):
    neutral.update_from_flattened_dict(flatten(default_config()[section], f"{section}."))
  neutral.recommender.candidate_similarity.users = config.recommender.candidate_similarity.users
  return neutral


def run(config: ml_collections.ConfigDict, workdir: str | pathlib.Path, given: Dataset | None = None) -> dict[str, Any]:
  """Runs, or goes on with, what `config` describes.

  Args:
    config: a `default_config` with fields set.
    workdir: gets `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `tokenizer/` and `results.json`; a
      folder or a URL.
    given: the data itself, where the config's source is "memory".

  Returns:
    What `results.json` holds.

  Raises:
    InputError: for anything wrong with the config, the data or the workdir, before anything is computed.
    Interrupted, Diverged, StorageError: as `training.loop.fit`.
  """
  with _begun(config, workdir, given) as prepared:
    finished = prepared.workdir / "results.json"
    if is_given(finished):
      results = load_results(prepared.workdir)
      say(f"{finished} is there already: this run is done")
    else:
      results = _train(prepared)
      write_json(finished, results)
      if processes.is_first():
        write_board(prepared.workdir, flatten(prepared.config))
    say(format_results(results))
    return results


def _train(run: _Run) -> dict[str, Any]:
  """Trains what is not trained yet, and evaluates: what `results.json` is to hold."""
  config, workdir, dataset, split, earlier = run.config, run.workdir, run.dataset, run.split, run.earlier
  ids, seconds, skipped = None, 0.0, 0.0
  if needs_semantic_ids(config):
    ids = _semantic_ids(run)
    check_fingerprint(workdir, ids)
    remote.keep(workdir)
    if not config.tokenizer.artefact:
      seconds, skipped = (tokenizer_figure(workdir / "tokenizer", name) for name in ("seconds", "skipped_steps"))
  with contextlib.closing(MetricsLog(workdir)) as log:
    metrics, progress = run_recommender(
      config,
      ids,
      split,
      dataset,
      workdir=workdir,
      partitioner=run.partitioner,
      log=log,
      warm=None if earlier is None else nightly.warm_start(config, earlier, split.train),
    )
  popularity = {
    "popularity" + suffix: popularity_metrics(
      split, split.test_target, num_items=dataset.num_items, histories=split.history("test") if suffix else None
    )
    for suffix in ("", WITHOUT_HISTORY)
  }
  return {
    "model": f"{config.recommender.head} head",
    "data": {
      name: run.figures[name] for name in ("name", "source", "users", "items", "interactions", "split", "split_hash")
    },
    **popularity,
    **metrics,
    "parameters": progress["parameters"],
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
