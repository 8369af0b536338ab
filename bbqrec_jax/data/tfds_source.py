"""Data sets of TensorFlow Datasets: of this project's own builder, or of any that has users, items and times."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.interactions import from_lengths, order_note, require_users
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.data.preparation.columns import LOG, choose
from bbqrec_jax.data.tables import load_data
from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.files import local_path

PREFIX = "tfds:"
_TITLES = ("movie_title", "title", "item_title", "product_title", "name")


def load_tfds(source: str, path: str | Path = "") -> Dataset:
  """Reads a data set, and makes it first if it is not there.

  Args:
    source: "tfds:NAME", such as "tfds:amazon_reviews/2014_beauty" or "tfds:movielens/100k-ratings".
    path: where TFDS keeps its data; "" is its usual place.

  Raises:
    InputError: if there is none of that name, it cannot be made here, or has no users and items.
  """
  name = source.removeprefix(PREFIX)
  builder = _builder(name, path)
  ours = {"number", "id", "items", "fields"} <= set(builder.info.features)
  dataset = _ours(builder, source) if ours else _ratings(builder, source)
  kept = require_users(dataset.interactions, path=source)
  return Dataset(**{**vars(dataset), "interactions": kept, "name": name})


def _builder(name: str, path: str | Path) -> Any:
  """A builder whose data is there, in array_record, which needs no TensorFlow to be read.

  Raises:
    InputError: if it cannot be.
  """
  import tensorflow_datasets as tfds

  from bbqrec_jax.data.amazon_reviews.builder import AmazonReviews  # Registers itself.
  from bbqrec_jax.data.amazon_reviews.releases import find_files

  folder = Path(tfds.core.constants.DATA_DIR)
  if path:
    folder = local_path(path, flag="config.data.path", use="read")
  try:
    builder = tfds.builder(name, data_dir=str(folder), file_format="array_record")
    if not builder.is_prepared():
      manual = folder / "downloads" / "manual"
      manual.mkdir(parents=True, exist_ok=True)
      if isinstance(builder, AmazonReviews):  # TFDS would refuse an empty folder, and not say what belongs there.
        find_files(manual, builder.builder_config.release, builder.builder_config.category)
      builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(manual)))
  except InputError as error:
    raise InputError(f"{PREFIX}{name}: {error}") from None
  except tfds.core.registered.DatasetNotFoundError:
    needs = ""
    if importlib.util.find_spec("tensorflow") is None:
      needs = ", or install TensorFlow, which most builders need to be found at all (pip install tensorflow)"
    raise InputError(
      f"{PREFIX}{name}: expected a builder of TensorFlow Datasets, found none of that name; correct it{needs}"
    ) from None
  except Exception as error:  # A registry of a thousand builders, most of which download.
    said = " ".join(str(error).split())[:400]
    raise InputError(
      f"{PREFIX}{name}: TensorFlow Datasets could not give it in {folder} ({type(error).__name__}: {said}); make it"
      " where there is a network, and copy the folder"
    ) from None
  return builder


def _ours(builder: Any, source: str) -> Dataset:
  users = sorted(builder.as_data_source(split="users"), key=lambda one: int(one["number"]))
  items = sorted(builder.as_data_source(split="items"), key=lambda one: int(one["number"]))
  lengths = np.array([len(one["items"]) for one in users], np.int64)
  times = np.concatenate([one["times"] for one in users]).astype(np.float64)
  histories = np.concatenate([one["items"] for one in users])
  interactions = from_lengths(
    histories, lengths, np.array([_text(one["id"]) for one in users], str), times if len(times) else None
  )
  features, present = {}, {}
  for modality in sorted(set(builder.info.features) - {"number", "id", "items", "times", "fields"}):
    width = max((len(one[modality]) for one in items), default=0)
    if width:
      present[modality] = np.array([len(one[modality]) == width for one in items])
      features[modality] = np.zeros((len(items), width), np.float32)
      features[modality][present[modality]] = [one[modality] for one in items if len(one[modality])]
  return Dataset(
    name=source,
    source=source,
    interactions=interactions,
    features=features,
    present=present,
    item_ids=ItemIds([_text(one["id"]) for one in items]),
    titles=tuple(json.loads(_text(one["fields"])).get("title", "") for one in items),
    notes=(order_note(interactions),),
  )


def _ratings(builder: Any, source: str) -> Dataset:
  """A data set of one interaction an example, as TFDS' own have it."""
  columns = tuple(builder.info.features)
  chosen = choose(columns, LOG, {}, ("user", "item"), where=source)
  names = {kind: chosen[kind][0] for kind in ("user", "item", "time") if kind in chosen}
  title = next((name for name in _TITLES if name in columns), "")
  table: dict[str, list[Any]] = {kind: [] for kind in names}
  titles: dict[str, str] = {}
  for split in builder.info.splits:
    for example in builder.as_data_source(split=split):
      for kind, name in names.items():
        value = example[name]
        table[kind].append(float(value) if kind == "time" else _text(value))
      titles.setdefault(table["item"][-1], _text(example[title]) if title else "")
  if not titles:
    raise InputError(f"{source}: expected interactions, found none")
  items = {"id": list(titles), "title": list(titles.values())}
  data = load_data(interactions=table, items=items, name=source)
  return Dataset(**{**vars(data), "source": source})


def _text(value: Any) -> str:
  return value.decode() if isinstance(value, bytes) else str(value)
