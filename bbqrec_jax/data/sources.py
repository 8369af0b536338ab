"""The data that a configuration names: synthetic, a folder of the project's own format, or RecBole's atomic files."""

import dataclasses
from typing import Any

from bbqrec_jax.data.dataset import Dataset, format_statistics, statistics
from bbqrec_jax.data.directory import load_directory
from bbqrec_jax.data.features import choose_modalities
from bbqrec_jax.data.recbole import load_recbole
from bbqrec_jax.data.synthetic import make_synthetic
from bbqrec_jax.errors import InputError

__all__ = [
  "Dataset",
  "format_statistics",
  "load",
  "load_directory",
  "load_recbole",
  "make_synthetic",
  "statistics",
]


def load(settings: Any) -> Dataset:
  """Loads what `config.data` names.

  Args:
    settings: has `source` ("synthetic", "directory" or "recbole"), `path`, `modalities`, `drop_short_users`, and
      `synthetic` with `num_users`, `num_items` and `seed`.

  Raises:
    InputError: if the source is unknown, or what it names is missing or wrong.
  """
  folder_sources = {"directory": load_directory, "recbole": load_recbole}
  if settings.source in folder_sources:
    return folder_sources[settings.source](
      settings.path, modalities=settings.modalities, drop_short_users=settings.drop_short_users
    )
  if settings.source != "synthetic":
    raise InputError(
      f"--config.data.source: expected one of synthetic, {', '.join(folder_sources)}, got {settings.source!r}"
    )
  if settings.path:
    # Whoever names a folder and forgets the source must not be given results on invented data.
    raise InputError(
      f"--config.data.path: expected none with --config.data.source=synthetic, got {str(settings.path)!r}; set"
      " --config.data.source=directory to read it"
    )
  made = settings.synthetic
  dataset = make_synthetic(num_users=made.num_users, num_items=made.num_items, seed=made.seed)
  names = choose_modalities(dataset.modalities, settings.modalities, path="synthetic data")
  return dataclasses.replace(
    dataset,
    features={name: dataset.features[name] for name in names},
    present={name: dataset.present[name] for name in names},
  )
