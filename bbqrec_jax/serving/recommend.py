"""The best next items of histories, by a finished run."""

import csv
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from bbqrec_jax.data.interactions import Interactions, distinct_items, from_lengths, select_users
from bbqrec_jax.data.item_ids import ItemIds, nearest, split_ids
from bbqrec_jax.data.ranking import ordinary_width, ranking_batches
from bbqrec_jax.errors import InputError, shown
from bbqrec_jax.layers.apply import apply
from bbqrec_jax.recommender.catalogue import Catalogue
from bbqrec_jax.recommender.model import SequenceModel
from bbqrec_jax.utils.files import unfinished

_BATCHES = (1, 16)  # Sizes of batches, for requests of less than a full one.

# Comparisons of beams with items to leave out at once: where many are left out, fewer users are ranked at once.
_COMPARED = 2**28


def parse_history(text: str, item_ids: ItemIds) -> np.ndarray:
  """Item rows [n] int32 from ids as "3,17,256"; see `split_ids`.

  Raises:
    InputError: if an entry is not the id of an item.
  """
  try:
    entries = split_ids(text)
  except csv.Error as error:
    raise InputError(f"--history: expected ids separated by commas, got {shown(text)} ({error})") from None
  return item_ids.require(entries, where=lambda place: f"--history entry {place + 1}")


def history_of(user: str, interactions: Interactions) -> Interactions:
  """The whole history of one user.

  Raises:
    InputError: if there is no such user; names those that are nearest.
  """
  found = np.flatnonzero(interactions.users == user)
  if not len(found):
    hint = nearest(user, interactions.users.tolist())
    raise InputError(f"--user: expected the id of a user of the run's data, got {shown(user)}; {hint}")
  return select_users(interactions, found)


def parse_times(text: str | None, *, count: int) -> np.ndarray | None:
  """Times [n] float64 from "874965478,874965518"; None for None.

  Raises:
    InputError: if they are not `count` finite numbers in time order.
  """
  if text is None:
    return None
  try:
    times = np.array(text.split(","), np.float64)
  except ValueError:
    times = np.array([np.nan])
  if len(times) != count or not np.isfinite(times).all() or np.any(times[1:] < times[:-1]):
    raise InputError(f"--times: expected {count} numbers in time order, one for each item of --history, got {text!r}")
  return times


def recommend(
  model: SequenceModel,
  params: Any,
  catalogue: Catalogue,
  history: np.ndarray,
  *,
  top: int,
  beam_width: int,
  repeat: bool = False,
  times: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """The best next items of one history.

  Args:
    model: the recommender.
    params: its parameters.
    catalogue: the items.
    history: [n] int, in time order; the last `max_length` count.
    top: how many items; fewer come back if the catalogue has fewer.
    beam_width: of a head that searches; at least `top` beams are kept.
    repeat: whether items of the history may come back.
    times: [n] the second of each interaction, for a model with time buckets.

  Returns:
    (items [top], scores [top]), best first; the score is the item's log-probability: of its semantic ID (generative),
    among all items (dense, parallel), or among the candidates (hybrid).
  """
  one = from_lengths(history, np.array([len(history)]), np.array(["history"]), times)
  ((_, items, scores),) = recommend_all(model, params, catalogue, one, top=top, beam_width=beam_width, repeat=repeat)
  return items, scores


@functools.lru_cache(maxsize=8)
def _compiled(model: SequenceModel) -> Callable[..., Any]:
  """Calls of a model's methods, each compiled once for a shape, however often histories are asked about."""
  return jax.jit(functools.partial(apply, model), static_argnums=1, static_argnames="width")


def recommend_all(
  model: SequenceModel,
  params: Any,
  catalogue: Catalogue,
  histories: Interactions,
  *,
  top: int,
  beam_width: int,
  repeat: bool = False,
  batch_size: int = 256,
  exclude: np.ndarray | None = None,
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
  """The best next items of every history, one after another.

  Args:
    model: as for `recommend`, and so are `params`, `catalogue`, `top`, `beam_width` and `repeat`.
    params: see there.
    catalogue: see there.
    histories: of the users, with times for a model with time buckets.
    top: see there.
    beam_width: see there.
    repeat: see there.
    batch_size: histories that are ranked at once, or of which fewer are, in one of few shapes.
    exclude: [n] int, items that nobody is to be recommended.

  Yields:
    (user, items [top], scores [top]) of each user, in order.

  Raises:
    InputError: if a history is empty.
  """
  if not np.all(histories.lengths):
    nobody = str(histories.users[int(np.argmin(histories.lengths))])
    raise InputError(
      f"history of {nobody!r}: expected at least one item, got none, and nothing tells what comes next; recommend what"
      " is popular"
    )
  call = _compiled(model)
  width = min(max(beam_width, top), catalogue.num_items)
  if exclude is not None:
    batch_size = max(1, min(batch_size, _COMPARED // (width * max(1, len(exclude)))))
  batch_size = min(size for size in (*_BATCHES, batch_size) if min(histories.num_users, batch_size) <= size)
  barred = None
  if exclude is not None:
    each = np.unique(exclude).astype(np.int32)
    barred = np.pad(each, (0, (1 << max(0, len(each) - 1).bit_length()) - len(each)), constant_values=-1)
  seen = None if repeat else distinct_items(histories)
  batches = functools.partial(
    ranking_batches,
    histories,
    np.zeros(histories.num_users, np.int32),
    batch_size=batch_size,
    max_length=model.settings.max_length,
    exclude=seen,
    width=1 if seen is None else ordinary_width(seen),
  )
  for first in range(0, histories.num_users, batch_size):
    users = np.arange(first, min(first + batch_size, histories.num_users))
    answers: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for places, batch in batches(users=users):
      out = batch.pop("exclude", None)
      if barred is not None:
        everyones = np.broadcast_to(barred, (len(batch["items"]), len(barred)))
        out = everyones if out is None else np.concatenate([out, everyones], axis=1)
      states = call(params, "last_states", catalogue, batch)
      found = call(params, "search", catalogue, states, width=width, exclude=out, seen=model.seen(batch))
      every = np.asarray(found.items)[:, :top], np.asarray(found.log_probs)[:, :top]
      answers |= dict(zip(places.tolist(), zip(*every, strict=True), strict=False))  # Without the rows that only fill.
    for place, user in enumerate(users):
      items, scores = answers[place]
      yield str(histories.users[user]), items[items >= 0], scores[items >= 0]


def write_recommendations(
  found: Iterator[tuple[str, np.ndarray, np.ndarray]], path: pathlib.Path, item_ids: ItemIds
) -> int:
  """Writes what `recommend_all` yields as lines of JSON, `{"user", "items", "scores"}`; the file is whole or not there.

  Items are written by their ids. A file whose name ends in `.parquet` gets the same as columns.

  Returns:
    How many users there are.
  """
  if path.suffix == ".parquet":
    return _write_parquet(found, path, item_ids)
  count = 0
  with open(unfinished(path), "w", encoding="utf-8") as file:
    for user, items, scores in found:
      rounded = [round(score, 4) for score in scores.tolist()]
      file.write(json.dumps({"user": user, "items": [item_ids[item] for item in items], "scores": rounded}) + "\n")
      count += 1
  os.replace(unfinished(path), path)
  return count


def _write_parquet(found: Iterator[tuple[str, np.ndarray, np.ndarray]], path: pathlib.Path, item_ids: ItemIds) -> int:
  import pyarrow as pa
  import pyarrow.parquet

  kind = pa.string() if any(isinstance(one, str) for one in item_ids.to_json()[:1]) else pa.int64()
  schema = pa.schema([("user", pa.string()), ("items", pa.list_(kind)), ("scores", pa.list_(pa.float32()))])
  count = 0
  with pyarrow.parquet.ParquetWriter(unfinished(path), schema) as writer:
    while block := list(itertools.islice(found, 2**14)):
      rows = [
        {"user": user, "items": [item_ids[item] for item in items], "scores": scores.tolist()}
        for user, items, scores in block
      ]
      writer.write_table(pa.Table.from_pylist(rows, schema))
      count += len(rows)
  os.replace(unfinished(path), path)
  return count


def left_out(allow: np.ndarray | None, deny: np.ndarray | None, *, num_items: int) -> np.ndarray | None:
  """Items that nobody is to be recommended, [n] int; None for none of them.

  Args:
    allow: [a] int, the only ones that may be; None for all.
    deny: [d] int, those that may not be; None for none.
    num_items: N.
  """
  if allow is None and deny is None:
    return None
  barred = np.zeros(num_items, bool)
  if allow is not None:
    barred[:] = True
    barred[allow] = False
  if deny is not None:
    barred[deny] = True
  return np.flatnonzero(barred)
