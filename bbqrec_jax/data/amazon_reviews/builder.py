"""Amazon's reviews as a builder of TensorFlow Datasets, in array_record, without TensorFlow.

    bbqrec train --config=hybrid --config.data.source=tfds:amazon_reviews/2014_beauty --config.data.path=DIR ...

An example of split "users" is a history, one of "items" an item with its features; `number` is their order.
"""

import gzip
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from bbqrec_jax.data.amazon_reviews.prepare import prepare_category, prepare_recipe
from bbqrec_jax.data.amazon_reviews.releases import RECIPES, RELEASES, find_files
from bbqrec_jax.data.directory import load_directory
from bbqrec_jax.data.encoding.encode import features

MODALITIES = ("text", "attributes", "image")


class AmazonReviewsConfig(tfds.core.BuilderConfig):
  """A category of a release, or a recipe."""

  def __init__(self, *, release: str, category: str, recipe: str = "", **given: Any):
    """See `releases`."""
    super().__init__(**given)
    self.release, self.category, self.recipe = release, category, recipe


def _configs() -> list[AmazonReviewsConfig]:
  categories = [
    AmazonReviewsConfig(name=f"{year}_{category.lower()}", release=year, category=category)
    for year, release in RELEASES.items()
    for category in release.categories
  ]
  recipes = [
    AmazonReviewsConfig(name=name, release=one.release, category=one.category, recipe=name)
    for name, one in RECIPES.items()
  ]
  return categories + recipes


class AmazonReviews(tfds.core.GeneratorBasedBuilder):
  """5-cores of Amazon's reviews: histories of users, and items with features of their texts and attributes."""

  VERSION = tfds.core.Version("1.1.0")
  BUILDER_CONFIGS = _configs()
  MANUAL_DOWNLOAD_INSTRUCTIONS = "Put the files of the category there, as the publisher calls them."

  def _info(self) -> tfds.core.DatasetInfo:
    vector = tfds.features.Tensor(shape=(None,), dtype=np.float32)
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict({
        "number": np.int64,
        "id": tfds.features.Text(),
        "items": tfds.features.Sequence(np.int64),
        "times": tfds.features.Sequence(np.int64),
        "fields": tfds.features.Text(),  # What items.jsonl says of an item.
        **dict.fromkeys(MODALITIES, vector),
      }),
    )  # fmt: skip

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, Any]]]:
    folder, config = Path(dl_manager.manual_dir), self.builder_config
    self._made = tempfile.TemporaryDirectory(prefix="bbqrec_")  # Until the examples are written.
    output = Path(self._made.name) / config.name
    if config.recipe:
      prepare_recipe(folder, output, name=config.recipe)
    else:
      prepare_category(folder, output, release=config.release, category=config.category)
    pictures = find_files(folder, config.release, config.category, ratings=bool(config.recipe)).pictures
    features(output, image="none", join={} if pictures is None else {"image": pictures})
    return {"users": self._users(output), "items": self._items(output)}

  def _generate_examples(self) -> None:
    """Not used: each split has a generator of its own."""

  def _users(self, folder: Path) -> Iterator[tuple[int, Any]]:
    interactions = load_directory(folder).interactions
    nothing = dict.fromkeys(MODALITIES, np.zeros(0, np.float32))
    for row, user in enumerate(interactions.users.tolist()):
      mine = slice(*interactions.offsets[row : row + 2])
      times = np.zeros(0, np.int64) if interactions.times is None else interactions.times[mine].astype(np.int64)
      items = interactions.items[mine].astype(np.int64)
      yield row, {"number": row, "id": user, "items": items, "times": times, "fields": "", **nothing}

  def _items(self, folder: Path) -> Iterator[tuple[int, Any]]:
    data = load_directory(folder)
    none = np.zeros(0, np.int64)
    with gzip.open(folder / "items.jsonl.gz", "rt", encoding="utf-8") as lines:
      for row, line in enumerate(lines):
        vectors = {
          name: np.asarray(data.features[name][row], np.float32)
          if name in data.features and data.present[name][row]
          else np.zeros(0, np.float32)
          for name in MODALITIES
        }
        fields = json.loads(line)
        yield row, {"number": row, "id": fields["id"], "items": none, "times": none, "fields": line.strip(), **vectors}
