"""What every source gives: the histories, the features and the titles of one catalogue, and figures about them."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from bbqrec_jax.data.feature_store import FeatureStore
from bbqrec_jax.data.features import features_hash
from bbqrec_jax.data.interactions import MINIMUM_LENGTH, Interactions, Split
from bbqrec_jax.data.item_ids import ItemIds


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """One catalogue of N items and the histories of its users.

  Attributes:
    name: what to call it in reports.
    source: the folder as it was given, or "synthetic".
    interactions: the whole histories, before any split.
    features: [N, D] float by modality, of which there may be none; row k is item k.
    present: [N] bool by modality, whether an item has it.
    item_ids: what the source calls the N items; what it calls the users is in `interactions`.
    titles: N titles; "" where the source has none.
    notes: sentences on how the source was read, for whoever looks at the statistics.
    time_unit: that the source has its times in, one of `times.UNITS`; those of the interactions are seconds.
  """

  name: str
  source: str
  interactions: Interactions
  features: dict[str, np.ndarray]
  present: dict[str, np.ndarray]
  item_ids: ItemIds
  titles: tuple[str, ...]
  notes: tuple[str, ...] = ()
  time_unit: str = "seconds"

  @property
  def num_items(self) -> int:
    """N."""
    return len(self.item_ids)

  @property
  def modalities(self) -> tuple[str, ...]:
    """The names of the modalities, in order."""
    return tuple(self.features)

  @functools.cached_property
  def store(self) -> FeatureStore:
    """The features standardised on demand, by statistics that are computed once."""
    return FeatureStore(self.features, self.present)


_SPLITS = {
  "leave-one-out": "leave-one-out split",
  "temporal": "temporal split",
  "none": "no split: figures below are of what was learned from;",
}


def statistics(dataset: Dataset, split: Split) -> dict[str, Any]:
  """Figures that say which data a result stands on, ready for JSON.

  Returns:
    name, source, users, items, interactions; history_length (mean, median, min, max); density, interactions / (users x
    items); short_users, how many are not ranked as they have fewer than 3; head_share, the share of interactions that
    the most popular 10 % of items hold; unseen_items, how many are in no training history; modalities (width and
    coverage of each); notes; split, its kind; split_hash, features_hash, ids_hash (of the items' and the users' ids),
    times_hash (None without times) and titles_hash (None without titles).
  """
  interactions = dataset.interactions
  lengths = interactions.lengths
  counts = np.sort(np.bincount(interactions.items, minlength=dataset.num_items))
  head = -(-dataset.num_items // 10)
  return {
    "name": dataset.name,
    "source": dataset.source,
    "users": interactions.num_users,
    "items": dataset.num_items,
    "interactions": interactions.num_interactions,
    "history_length": {
      "mean": float(np.mean(lengths)),
      "median": float(np.median(lengths)),
      "min": int(np.min(lengths)),
      "max": int(np.max(lengths)),
    },
    "density": interactions.num_interactions / (interactions.num_users * dataset.num_items),
    "short_users": int(np.sum(lengths < MINIMUM_LENGTH)) if split.kind == "leave-one-out" else 0,
    "head_share": float(counts[-head:].sum() / interactions.num_interactions),
    "unseen_items": int(np.sum(np.bincount(split.train.items, minlength=dataset.num_items) == 0)),
    "modalities": {
      name: {"width": array.shape[1], "coverage": float(np.mean(dataset.present[name]))}
      for name, array in dataset.features.items()
    },
    "notes": list(dataset.notes),
    "split": split.kind,
    "split_hash": split.split_hash,
    "features_hash": features_hash(dataset.features, dataset.present),
    "ids_hash": hashlib.sha256("\n".join([dataset.item_ids.digest, *interactions.users]).encode()).hexdigest()[:16],
    "times_hash": None if interactions.times is None else hashlib.sha256(interactions.times.tobytes()).hexdigest()[:16],
    "titles_hash": hashlib.sha256(repr(dataset.titles).encode()).hexdigest()[:16] if any(dataset.titles) else None,
  }


def format_statistics(figures: Mapping[str, Any]) -> str:
  """The figures of `statistics` as a short block of text."""
  length, short = figures["history_length"], figures["short_users"]
  source = "" if figures["source"] == "synthetic" else f" from {figures['source']}"
  lines = [
    f"data: {figures['name']}{source}",
    f"  {figures['users']:,} users, {figures['items']:,} items, {figures['interactions']:,} interactions"
    f" (density {figures['density']:.3%})",
    f"  history length: mean {length['mean']:.1f}, median {length['median']:g}, {length['min']} to {length['max']}",
    f"  the most popular 10 % of items hold {figures['head_share']:.1%} of the interactions;"
    f" {figures['unseen_items']:,} items are never seen in training",
  ]
  if short:
    lines.append(f"  {short:,} users have fewer than {MINIMUM_LENGTH} interactions: they are learned from, not ranked")
  for name, modality in figures["modalities"].items():
    lines.append(f"  {name}: width {modality['width']}, {modality['coverage']:.1%} of items have it")
  lines += [f"  {note}" for note in figures["notes"]]
  features = f"features {figures['features_hash']}" if figures["modalities"] else "no features"
  lines.append(f"  {_SPLITS[figures['split']]} {figures['split_hash']}, {features}")
  return "\n".join(lines)
