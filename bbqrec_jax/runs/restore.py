"""Restores a finished run for ranking: its best model, with its own items or with new ones added."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.directory import has_items, read_new_items
from bbqrec_jax.data.feature_store import FeatureStore, far_features
from bbqrec_jax.data.features import feature_widths, load_new_items
from bbqrec_jax.data.interactions import Split
from bbqrec_jax.data.sources import MEMORY
from bbqrec_jax.errors import InputError
from bbqrec_jax.recommender.catalogue import Catalogue
from bbqrec_jax.recommender.items import item_features
from bbqrec_jax.recommender.model import SequenceModel
from bbqrec_jax.recommender.settings import needs_semantic_ids
from bbqrec_jax.recommender.train import build_recommender, check_fingerprint, initial_state
from bbqrec_jax.runs.run import load_ids, read_data
from bbqrec_jax.runs.workdir import HASHES, load_config, load_results
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.training.checkpointing import restore_state
from bbqrec_jax.training.state import TrainState
from bbqrec_jax.utils.environment import start_devices
from bbqrec_jax.utils.files import check_links, is_given, is_url, local_path
from bbqrec_jax.utils.json_files import read_json
from bbqrec_jax.utils.messages import warn


class Restored(NamedTuple):
  """A finished run, as far as ranking needs it.

  Attributes:
    dataset: its data.
    ids: its semantic IDs, those of new items at the end; None where it needs none.
    model: the recommender.
    params: the best ones by validation.
    catalogue: what the model is told of the items.
    config: of the run.
    split: of the data, as the run had it.
  """

  dataset: Dataset
  ids: SemanticIds | None
  model: SequenceModel
  params: Any
  catalogue: Catalogue
  config: ml_collections.ConfigDict
  split: Split


def restore(
  workdir: str | pathlib.Path,
  *,
  data: str | pathlib.Path | None = None,
  given: Dataset | None = None,
  tokenizer: str | pathlib.Path | None = None,
  features: str | pathlib.Path | None = None,
  trusted: Collection[str] = (),
) -> Restored:
  """The best model of a finished workdir, of the items it was trained on or of more; none of its files is run.

  Args:
    workdir: of the run; it may be a URL, as may the other folders.
    data: the folder of its data, where that has moved since.
    given: the data itself, of a run whose data was in memory.
    tokenizer: semantic IDs that `bbqrec assign` extended by new items, for a recommender that reads IDs.
    features: the folder of the new items' features, as `assign` was given it, for one whose item inputs are "features".
    trusted: Python modules outside this project that the config may name its head and backbone from.

  Raises:
    InputError: if the run is not finished or its files do not fit one another, the data is not what it was trained on,
      the new items do not fit, the config names code that is not trusted, or JAX cannot start (see `start_devices`).
  """
  workdir = local_path(workdir, flag="workdir", use="read")
  data, tokenizer, features = (
    None if path is None else local_path(path, flag=flag, use="read")
    for flag, path in (("data", data), ("tokenizer", tokenizer), ("features", features))
  )
  start_devices()
  config = load_config(workdir, trusted=trusted)
  check_links(workdir)
  if not is_given(workdir / "results.json"):
    raise InputError(f"{workdir} holds no finished run (no results.json): start its command again")
  best = load_results(workdir)["best_step"]
  _point_to_data(config, workdir, data)
  dataset, split, figures = read_data(config, given=given)
  trained_on = read_json(workdir / "run.json")
  for name in HASHES:
    if trained_on.get(f"data {name}") != figures[name]:
      raise InputError(
        f"{dataset.source} has {name} {figures[name]}, the run in {workdir} was trained on"
        f" {trained_on.get(f'data {name}')}: give it its own data, --data=DIR"
      )
  ids = None
  if needs_semantic_ids(config):
    ids = load_ids(config, workdir, dataset, figures)
    check_fingerprint(workdir, ids, trained=True)
  known = dataset.store
  rows = item_features(config, known)
  build = functools.partial(build_recommender, config, histories=split.train)
  model, catalogue = build(ids, num_items=dataset.num_items, features=rows, titles=dataset.titles)
  like = _like(config, model, catalogue)
  if tokenizer is not None or features is not None:
    ids, new, dataset = _extended(workdir, config, dataset, ids, tokenizer, features)
    more = {} if new is None else item_features(config, new)
    rows = {name: np.concatenate([known_rows, more[name]]) for name, known_rows in rows.items()}
    _, catalogue = build(ids, num_items=dataset.num_items, features=rows, titles=dataset.titles)
  state = restore_state(workdir / "checkpoints" / "recommender", best, like, strict=not config.shard_rows)
  return Restored(dataset, ids, model, state.params, catalogue, config, split)


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
  dataset: Dataset,
  ids: SemanticIds | None,
  tokenizer: pathlib.Path | None,
  folder: pathlib.Path | None,
) -> tuple[SemanticIds | None, FeatureStore | None, Dataset]:
  """What a recommender is told of new items: IDs of all items, the new ones' features, and their ids and titles.

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
      " bbqrec assign"
    )
  if reads_features and folder is None:
    raise InputError(f"{workdir}: its recommender reads features: give those of the new items too (--features)")
  extended, new = None, _new_items(dataset.store, folder) if folder is not None else None
  if ids is not None and tokenizer is not None:
    extended = SemanticIds.load(tokenizer)
    extended.check_extension(ids, where=tokenizer)
    ids, count = extended, len(extended.codes) - dataset.num_items
    if new is not None and new.num_items != count:
      raise InputError(f"{folder}: expected features of the {count} new items of {tokenizer}, got {new.num_items} rows")
    item_ids, titles = extended.item_ids, ("",) * count
  if folder is not None and new is not None and (extended is None or has_items(folder)):
    item_ids, titles = read_new_items(folder, dataset.item_ids, count=new.num_items)
    if extended is not None:
      extended.check_items(item_ids, where=tokenizer, mend=f"give --features the folder that {tokenizer} was made from")
  return ids, new, dataclasses.replace(dataset, item_ids=item_ids, titles=dataset.titles + titles)


def _point_to_data(config: ml_collections.ConfigDict, workdir: pathlib.Path, data: pathlib.Path | None) -> None:
  """Sets where the data of a run is now, if that is told.

  Raises:
    InputError: if there is no such folder, or the data of this run is in none.
  """
  if config.data.source == MEMORY:
    return
  if config.data.source == "synthetic":
    if data is not None:
      raise InputError(f"--data={data}: the run in {workdir} makes its own data; leave --data out")
    return
  if data is not None:
    config.data.path = str(data)
  if config.data.source.startswith("tfds:") and not config.data.path:
    return
  if not is_url(config.data.path) and not os.path.isdir(config.data.path):
    raise InputError(
      f"{config.data.path}: expected the data of the run in {workdir}, found no such folder; say where it is now with"
      " --data=DIR"
    )


def _like(config: ml_collections.ConfigDict, model: SequenceModel, catalogue: Catalogue) -> TrainState:
  """Shapes and dtypes of the state that a config makes, on the first device; nothing is allocated."""
  where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  shapes = jax.eval_shape(lambda: initial_state(config, model, catalogue, total_steps=1))
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes)
