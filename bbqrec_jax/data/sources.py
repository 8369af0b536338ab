"""The data that a config names: a folder (own format or RecBole's), a TFDS builder, memory, or synthetic data."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from bbqrec_jax.data.dataset import Dataset, format_statistics, statistics
from bbqrec_jax.data.directory import load_directory
from bbqrec_jax.data.features import choose_modalities
from bbqrec_jax.data.files import require_folder
from bbqrec_jax.data.interactions import (
  MINIMUM_LENGTH,
  Interactions,
  Split,
  choose,
  drop_short_users,
  leave_one_out,
  require_users,
  temporal,
  without_split,
)
from bbqrec_jax.data.recbole import load_recbole
from bbqrec_jax.data.settings import moment
from bbqrec_jax.data.synthetic import make_synthetic
from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.files import is_given

MEMORY = "memory"  # The source of data that a program gives.

__all__ = [
  "MEMORY",
  "Dataset",
  "complete_items",
  "format_statistics",
  "load",
  "load_directory",
  "load_recbole",
  "make_synthetic",
  "recognise_source",
  "split_of",
  "statistics",
]


def recognise_source(path: str | Path) -> str:
  """The `data.source` that reads a folder: "directory" where there is a sequences.txt, "recbole" where a .inter is.

  Raises:
    InputError: if it is no folder, or has neither.
  """
  folder = require_folder(path)
  if is_given(folder / "sequences.txt"):
    return "directory"
  if any(folder.glob("*.inter")) or any(folder.glob("*.inter.gz")):
    return "recbole"
  raise InputError(
    f"{folder}: expected sequences.txt ('user item item ...' lines) or a .inter file (RecBole's), found neither; give"
    " the folder that holds one"
  )


def complete_items(dataset: Dataset) -> Dataset:
  """The data set without the items that lack a modality and their interactions; the others keep their order and ids.

  Args:
    dataset: a data set of N items, with at least one modality.

  Raises:
    InputError: if no item has every modality, or no user is left.
  """
  keep = np.logical_and.reduce(list(dataset.present.values()))
  if not keep.any():
    raise InputError(
      f"{dataset.source}: expected items with every one of {', '.join(dataset.modalities)}, found none; leave a"
      " modality out (data.modalities) or set data.drop_incomplete_items=False"
    )
  old = dataset.interactions
  kept = keep[old.items]
  lengths = np.add.reduceat(np.append(kept, False).astype(np.int64), old.offsets[:-1]) * (old.lengths > 0)
  renumbered = dataclasses.replace(old, items=(np.cumsum(keep) - 1)[old.items])
  interactions = drop_short_users(choose(renumbered, kept, lengths, old.users), minimum=1)
  return dataclasses.replace(
    dataset,
    interactions=require_users(interactions, path=f"{dataset.source} without the items that lack a modality"),
    features={name: array[keep] for name, array in dataset.features.items()},
    present={name: mask[keep] for name, mask in dataset.present.items()},
    item_ids=dataset.item_ids.keep(keep),
    titles=tuple(title for title, here in zip(dataset.titles, keep, strict=True) if here),
  )


def split_of(settings: Any, interactions: Interactions) -> Split:
  """The split that `config.data` asks for.

  Args:
    settings: has `split`, `validation_from` and `test_from`.
    interactions: the whole histories, with times where the split needs them.

  Raises:
    InputError: as `leave_one_out`, `temporal` and `without_split`.
  """
  if settings.split == "temporal":
    first, second = (moment(getattr(settings, name), field=f"data.{name}") for name in ("validation_from", "test_from"))
    return temporal(interactions, validation_from=first, test_from=second)
  return without_split(interactions) if settings.split == "none" else leave_one_out(interactions)


def load(settings: Any, given: Dataset | None = None) -> Dataset:
  """Loads what `config.data` names; there may be no features.

  Args:
    settings: has `source` ("synthetic", "directory", "recbole", "memory" or "tfds:NAME"), `path`, `modalities`,
      `drop_short_users`, `drop_incomplete_items`, and `synthetic` with `num_users`, `num_items` and `seed`.
    given: the data itself, where the source is "memory".

  Raises:
    InputError: if the source is unknown, or what it names is missing or wrong.
  """
  dataset = _load(settings, given)
  if settings.drop_incomplete_items and dataset.modalities:
    dataset = complete_items(dataset)
  if settings.drop_short_users:
    kept = drop_short_users(dataset.interactions)
    path = f"{dataset.source} without the users that have fewer than {MINIMUM_LENGTH} interactions"
    dataset = dataclasses.replace(dataset, interactions=require_users(kept, path=path))
  return dataset


def _load(settings: Any, given: Dataset | None) -> Dataset:
  """All of what `config.data` names."""
  folder_sources = {"directory": load_directory, "recbole": load_recbole}
  if settings.source in folder_sources:
    return folder_sources[settings.source](settings.path, modalities=settings.modalities)
  if settings.source.startswith("tfds:"):
    from bbqrec_jax.data.tfds_source import load_tfds  # Imports TensorFlow Datasets, which takes seconds.

    dataset = load_tfds(settings.source, settings.path)
    return _chosen(dataset, settings.modalities)
  if settings.source == MEMORY:
    if given is None:
      raise InputError(
        "this run's data was given by a program (data.source = 'memory'), and is in no folder: call bbqrec_jax.run or"
        " bbqrec_jax.load_run with data=..., or name a folder with --data"
      )
    require_users(given.interactions, path="interactions")
    return _chosen(given, settings.modalities)
  if settings.source != "synthetic":
    known = ", ".join(("synthetic", *folder_sources, MEMORY))
    raise InputError(f"--config.data.source: expected one of {known} or tfds:NAME, got {settings.source!r}")
  if settings.path:
    # Whoever names a folder and forgets the source must not be given results on invented data.
    raise InputError(
      f"--config.data.path: expected none with --config.data.source=synthetic, got {str(settings.path)!r}; set"
      " --config.data.source=directory to read it"
    )
  made = settings.synthetic
  dataset = make_synthetic(num_users=made.num_users, num_items=made.num_items, seed=made.seed)
  return _chosen(dataset, settings.modalities)


def _chosen(dataset: Dataset, modalities: tuple[str, ...]) -> Dataset:
  """The data set with some of its modalities alone."""
  names = choose_modalities(dataset.modalities, modalities, path=dataset.name)
  return dataclasses.replace(
    dataset,
    features={name: dataset.features[name] for name in names},
    present={name: dataset.present[name] for name in names},
  )
