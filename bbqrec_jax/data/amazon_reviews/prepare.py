"""A category of Amazon's reviews as a data set in the project's own format."""

from pathlib import Path
from typing import Any

from bbqrec_jax.data.amazon_reviews.releases import RECIPES, RELEASES, Recipe, find_files
from bbqrec_jax.data.preparation.prepare import prepare
from bbqrec_jax.data.preparation.tables import open_table
from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.messages import warn


def prepare_category(
  folder: str | Path,
  output: str | Path,
  *,
  release: str,
  category: str,
  ratings: bool = False,
  images: str | Path | None = None,
  **settings: Any,
) -> dict[str, Any]:
  """Prepares a category; the 5-core unless the settings say otherwise.

      prepare_category("downloads", "beauty", release="2014", category="Beauty")

  Args:
    folder: with the files as the publisher calls them, packed or unpacked.
    output: the folder to make.
    release: "2014", "2018" or "2023".
    category: as the files are called, such as "Musical_Instruments".
    ratings: whether the log is the table of all ratings (of 2018), in place of the reviews.
    images: as for `prepare`.
    **settings: fields of `PreparationSettings`.

  Returns:
    As `prepare`.

  Raises:
    InputError: as `prepare`, or if there is no such category, or its files are not there.
  """
  files = find_files(Path(folder), release, category, ratings=ratings)
  of = RELEASES[release]
  there = open_table(files.meta, what="item table").columns  # No category has all that the release may have.
  items = {
    kind: name if (name if isinstance(name, str) else name[0]) in there else "none" for kind, name in of.items.items()
  }
  log = {"columns": of.ratings} if ratings else of.log
  given = {**log, **items, "min_per_user": 5, "min_per_item": 5} | settings
  return prepare(files.reviews, output, items=files.meta, images=images, **given)


def prepare_recipe(
  folder: str | Path, output: str | Path, *, name: str, images: str | Path | None = None
) -> dict[str, Any]:
  """Prepares a data set that published results stand on, and says where its counts are not the published ones.

  Args:
    folder: as for `prepare_category`.
    output: see there.
    name: of `RECIPES`.
    images: the pictures as they were downloaded; without them an item has a picture if its metadata names one.

  Returns:
    As `prepare`.

  Raises:
    InputError: as `prepare_category`, or if there is no such recipe.
  """
  if name not in RECIPES:
    raise InputError(f"expected a recipe of {', '.join(RECIPES)}, got {name!r}")
  recipe = RECIPES[name]
  report = prepare_category(
    folder,
    output,
    release=recipe.release,
    category=recipe.category,
    ratings=True,
    images=images,
    require=("metadata", "picture"),
    duplicates="first",
  )
  for sentence in differences(recipe, report):
    warn(f"{name}: {sentence}")
  return report


def differences(recipe: Recipe, report: dict[str, Any]) -> list[str]:
  """Where a prepared data set differs from what is published of it, as sentences."""
  last = report["steps"][-1]
  return [
    f"{last[kind]} {kind}, where {getattr(recipe, kind)} are published; results are not comparable"
    for kind in ("users", "items")
    if last[kind] != getattr(recipe, kind)
  ]
