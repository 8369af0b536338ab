"""A run that begins where another ended: tomorrow's data with yesterday's semantic IDs and parameters.

Items are known by their ids, whatever their numbers. Those that the earlier run knew keep their semantic IDs; new ones
get theirs from its tokenizer, which no longer learns (`assign`), so that IDs stay what they were. The recommender
begins with the earlier one's parameters, in which a new item has the mean of the known ones (`WarmStart`).
"""

import dataclasses
import pathlib
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.feature_store import FeatureStore
from bbqrec_jax.data.interactions import Interactions
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.errors import InputError
from bbqrec_jax.recommender.catalogue import Catalogue
from bbqrec_jax.recommender.model import SequenceModel
from bbqrec_jax.recommender.train import WarmStart, initial_state
from bbqrec_jax.recommender.two_towers import make_recommender
from bbqrec_jax.runs.workdir import load_results
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.semantic_ids.repair import collision_rate
from bbqrec_jax.tokenizer.new_items import assign, quantize
from bbqrec_jax.training.checkpointing import read_params
from bbqrec_jax.utils.files import is_given
from bbqrec_jax.utils.json_files import read_json, write_json
from bbqrec_jax.utils.messages import say, warn

_CHECKED = 2048  # Known items whose features are looked at again.
_SAME = 0.9  # Share of their codes that must come out as they were.


class Earlier(NamedTuple):
  """A finished run, as far as another needs it to begin with.

  Attributes:
    workdir: of the run.
    item_ids: what its data called the items.
    learned_from: how many interactions of each user the run learned from; none known of a run of an older version.
    rows: [N] int64, the number there of each item of the new data; -1 of new items.
  """

  workdir: pathlib.Path
  item_ids: ItemIds
  learned_from: dict[str, int | None]
  rows: np.ndarray


def read_earlier(workdir: pathlib.Path, dataset: Dataset) -> Earlier:
  """The run of a workdir, and which of a data set's items it knows; its data is not needed.

  Raises:
    InputError: if the run is not finished, or knows none of the items.
  """
  if not is_given(workdir / "results.json") or not is_given(workdir / "ids.json"):
    raise InputError(f"--init_from={workdir}: expected the workdir of a finished run, found none; give one")
  noted = read_json(workdir / "ids.json")
  try:
    item_ids, users = ItemIds.from_json(noted.get("items")), list(map(str, noted.get("users") or ()))
    counts = map(int, noted["learned_from"]) if noted.get("learned_from") else [None] * len(users)
    learned_from = dict(zip(users, counts, strict=True))
  except (ValueError, TypeError) as error:
    raise InputError(f"{workdir / 'ids.json'}: {error}; restore it") from None
  rows = item_ids.rows(list(map(str, dataset.item_ids.to_json())))
  if not np.any(rows >= 0):
    raise InputError(
      f"--init_from={workdir}: expected a run on earlier data of the same items, but none of the {dataset.num_items}"
      " items is one of its; train anew without it"
    )
  return Earlier(workdir, item_ids, learned_from, rows)


def describe(earlier: Earlier, dataset: Dataset) -> str:
  """What is known, new and gone, in words."""
  known = int(np.sum(earlier.rows >= 0))
  users, earlier_users = set(dataset.interactions.users.tolist()), earlier.learned_from.keys()
  return (
    f"beginning from {earlier.workdir}: {known:,} items are known, {dataset.num_items - known:,} new,"
    f" {len(earlier.item_ids) - known:,} gone; {len(users & earlier_users):,} users are known,"
    f" {len(users - earlier_users):,} new, {len(earlier_users - users):,} gone"
  )


def learned_before(earlier: Earlier, train: Interactions) -> int:
  """How many users the earlier run learned more interactions of than are to be learned from now."""
  known = [earlier.learned_from.get(user) or 0 for user in train.users.tolist()]
  return int(np.sum(np.array(known, np.int64) > train.lengths))


def grow_ids(ids: SemanticIds, earlier: Earlier, dataset: Dataset, *, data_hash: str) -> SemanticIds:
  """The semantic IDs of an earlier run for the items of new data, in their order.

  Args:
    ids: of the earlier run.
    earlier: which items it knows.
    dataset: the new data.
    data_hash: of it.

  Raises:
    InputError: as `assign`, or if the features of known items are not what the tokenizer was trained on.
  """
  _check_features(ids, earlier, dataset)
  new = np.flatnonzero(earlier.rows < 0)
  place = earlier.rows.copy()
  if len(new):
    names = ItemIds([*map(str, ids.item_ids.to_json()), *(str(dataset.item_ids[row]) for row in new.tolist())])
    features = {name: np.asarray(array[new]) for name, array in dataset.features.items()}
    present = {name: mask[new] for name, mask in dataset.present.items()}
    count = len(ids.codes)
    ids = assign(ids, features, present, item_ids=names)
    place[new] = np.arange(count, count + len(new))
    say(f"semantic IDs of {len(new):,} new items: {collision_rate(ids.codes[count:]):.1%} collide after repair")
  return dataclasses.replace(
    ids,
    codes=np.ascontiguousarray(ids.codes[place]),
    stream_codes=np.ascontiguousarray(ids.stream_codes[:, place]),
    present=np.ascontiguousarray(ids.present[:, place]),
    item_ids=dataset.item_ids,
    data_hash=data_hash,
  )


def _check_features(ids: SemanticIds, earlier: Earlier, dataset: Dataset) -> None:
  """Makes sure that known items still have the features that the tokenizer was trained on.

  Raises:
    InputError: if nearly none of them has.
  """
  known = np.flatnonzero(earlier.rows >= 0)
  known = known[np.linspace(0, len(known) - 1, min(len(known), _CHECKED)).astype(np.int64)]
  store = FeatureStore(
    {name: np.asarray(array[known]) for name, array in dataset.features.items()},
    {name: mask[known] for name, mask in dataset.present.items()},
  )
  again = quantize(ids, store.features, store.present)
  kept = ids.stream_codes[:, earlier.rows[known]]
  modalities = [index for index, name in enumerate(ids.streams) if name in dataset.features]
  same = float(np.mean(again[modalities, :, 0] == kept[modalities, :, 0])) if modalities else 1.0
  if same < _SAME:
    said = (
      f"{dataset.source}: of {len(known)} known items only {same:.0%} of the first codes come out as they were: their"
      " features were made in another way than those that the tokenizer was trained on (bbqrec features DIR"
      " --like=YESTERDAY makes them in the same)"
    )
    if same < 0.5:
      raise InputError(said)
    warn(said)


def make_ids(earlier: Earlier, dataset: Dataset, folder: pathlib.Path, *, data_hash: str) -> SemanticIds:
  """`grow_ids` of the earlier run's tokenizer, kept in a folder with a health report."""
  started = time.monotonic()
  ids = grow_ids(SemanticIds.load(earlier.workdir / "tokenizer"), earlier, dataset, data_hash=data_hash)
  seconds = time.monotonic() - started
  write_json(folder / "health.json", {"grown_from": str(earlier.workdir), "seconds": seconds, "skipped_steps": 0})
  ids.save(folder)
  return SemanticIds.load(folder)


def warm_start(config: Any, earlier: Earlier, train: Interactions) -> WarmStart:
  """What a run takes from an earlier one's recommender; `train` is what the new run learns from."""

  def has_new(user: str, length: int) -> bool:
    known = earlier.learned_from.get(user, 0)
    return known is not None and length > known

  unseen = [has_new(user, length) for user, length in zip(train.users.tolist(), train.lengths.tolist(), strict=True)]
  return WarmStart(
    grow=lambda model, catalogue, params: grow_params(config, model, catalogue, params, earlier),
    unseen=np.array(unseen, bool),
  )


def grow_params(config: Any, model: SequenceModel, catalogue: Catalogue, params: Any, earlier: Earlier) -> Any:
  """The parameters of an earlier run's recommender, for the items of new data.

  Args:
    config: of the new run.
    model: its recommender.
    catalogue: of its items.
    params: its fresh parameters, on the host; a new item's are these plus the known items' mean.
    earlier: which items the earlier run knows.

  Raises:
    InputError: if the earlier recommender is of another kind.
  """
  best = load_results(earlier.workdir)["best_step"]
  before = read_params(earlier.workdir / "checkpoints" / "recommender", best)
  # A model takes more items than it was made for: what has one row less, made for one item less, is of items.
  fewer = make_recommender(dataclasses.replace(model.settings, num_items=model.settings.num_items - 1))
  smaller = jax.eval_shape(lambda: initial_state(config, fewer, catalogue, total_steps=1)).params
  old = dict(_leaves(before))
  count, known = len(earlier.item_ids), earlier.rows >= 0

  def one(path: str, fresh: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    of_items = shape != fresh.shape
    expected = (count, *fresh.shape[1:]) if of_items else fresh.shape
    found = old.pop(path, None)
    if found is None or found.shape != expected:
      came = "none" if found is None else str(list(found.shape))
      raise InputError(
        f"--init_from={earlier.workdir}: expected a recommender of the same kind, but of {path} it has {came}, where"
        f" {list(expected)} is needed; give the config that it was trained with, or train anew"
      )
    if of_items:
      rows = known.reshape(-1, *[1] * (fresh.ndim - 1))
      found = np.where(rows, found[earlier.rows], found.mean(axis=0) + fresh)
    return found

  shapes = {path: leaf.shape for path, leaf in _leaves(smaller)}
  made = {path: one(path, np.asarray(leaf), shapes[path]) for path, leaf in _leaves(params)}
  if old:
    raise InputError(
      f"--init_from={earlier.workdir}: expected a recommender of the same kind, but it has {', '.join(sorted(old)[:3])}"
      " too; give the config that it was trained with, or train anew"
    )
  treedef = jax.tree.structure(params)
  return jax.tree.unflatten(treedef, [made[path].astype(leaf.dtype) for path, leaf in _leaves(params)])


def _leaves(tree: Any) -> list[tuple[str, Any]]:
  """The arrays of nested dictionaries by their path, in the order of `jax.tree`."""
  found = jax.tree_util.tree_flatten_with_path(tree)[0]
  return [("/".join(str(getattr(key, "key", key)) for key in path), leaf) for path, leaf in found]
