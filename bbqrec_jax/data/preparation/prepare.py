"""From a log, an item table and pictures to a folder in the project's own format, with a data card."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bbqrec_jax.data.dataset import Dataset, format_statistics, statistics
from bbqrec_jax.data.directory import load_directory
from bbqrec_jax.data.directory import read_items as read_written
from bbqrec_jax.data.interactions import leave_one_out
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.data.preparation.card import write_card
from bbqrec_jax.data.preparation.columns import said
from bbqrec_jax.data.preparation.filters import core, in_order, repeated, without_duplicates
from bbqrec_jax.data.preparation.items import (
  ItemFigures,
  Pictures,
  has_required,
  item_columns,
  read_items,
  read_vectors,
  write_items,
)
from bbqrec_jax.data.preparation.logs import Log, read_log
from bbqrec_jax.data.preparation.quarantine import Quarantine
from bbqrec_jax.data.preparation.settings import PreparationSettings
from bbqrec_jax.data.preparation.tables import open_table
from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.files import check_new, local_path, unfinished
from bbqrec_jax.utils.json_files import write_json
from bbqrec_jax.utils.messages import say
from bbqrec_jax.utils.settings import from_config

_USERS = 2**16  # Whose lines are written at once.


class Source(NamedTuple):
  """What a data set is made of, read when it is asked for.

  Attributes:
    log: its name.
    read_log: (where bad rows go) -> what it holds.
    table: the name of the item table; None without one.
    columns: of the table, what is read as what, in words.
    read_items: (where bad rows go) -> the table's items, each once.
    read_vectors: (ids of the N items) -> the table's vectors [N, D] by modality; None where it has none.
    unused: items of the table without interactions that `read_items` does not give.
  """

  log: str
  read_log: Callable[[Quarantine], Log]
  table: str | None = None
  columns: str = ""
  read_items: Callable[[Quarantine], Iterable[dict[str, Any]]] = lambda quarantine: ()
  read_vectors: Callable[[ItemIds], dict[str, np.ndarray]] | None = None
  unused: int = 0


@dataclasses.dataclass(frozen=True)
class Step:
  """What was left after one step of preparation."""

  name: str
  interactions: int
  users: int
  items: int


def prepare(
  source: Any, output: str | Path, *, items: Any = None, images: str | Path | None = None, **settings: Any
) -> dict[str, Any]:
  """Makes a data set of logs: a folder in the project's own format, for `load_data`, `features` and `train`.

      bbqrec_jax.prepare("clicks.csv", "shop", items="products.csv", images="pictures")
      bbqrec_jax.prepare(df, "shop", items=products, user="customer", min_per_user=5, min_per_item=5)

  Args:
    source: the log: a CSV, TSV, Parquet or JSON-lines file, or a table in memory (pandas, polars, pyarrow, a dictionary
      of columns); or a folder of RecBole's atomic files.
    output: the folder to make: `sequences.txt`, `timestamps.txt`, `users.txt`, `items.jsonl.gz`, `preparation.json`,
      the data card `card.html`, and `quarantine.jsonl` where rows could not be used.
    items: the item table, likewise.
    images: a folder of pictures.
    **settings: fields of `PreparationSettings`.

  Returns:
    What `preparation.json` holds.

  Raises:
    InputError: if a file cannot be read, a column not be found, too many rows not be used, or nothing is left; nothing
      is written then.
  """
  chosen = settings_of(settings)
  output = local_path(output, flag="output")
  check_new(output)
  source, items = _recbole(source, items)
  log = open_table(source, what="log", columns=chosen.columns)
  tables = Source(log.name, lambda quarantine: read_log(log, chosen, quarantine))
  if items is not None:
    table = open_table(items, what="item table")
    columns = item_columns(table, chosen)
    tables = tables._replace(
      table=table.name,
      columns=said(columns | {"vectors": table.vectors} if table.vectors else columns, table.columns),
      read_items=lambda quarantine: read_items(table, chosen, quarantine, columns),
    )
    if table.vectors:
      tables = tables._replace(read_vectors=lambda item_ids: read_vectors(table, columns["item_id"][0], item_ids))
  return prepare_source(tables, images, output, chosen)


def settings_of(given: dict[str, Any]) -> PreparationSettings:
  """The settings, checked.

  Raises:
    InputError: if one is unknown or wrong.
  """
  fields = {field.name: field.default for field in dataclasses.fields(PreparationSettings)}
  given = {
    name: (value,) if isinstance(value, str) and isinstance(fields.get(name), tuple) else value
    for name, value in given.items()
  }
  try:
    return from_config(PreparationSettings, fields | given)
  except InputError as error:
    raise InputError(str(error).replace("config field ", "--").replace("--help-config", "--help")) from None


def _recbole(source: Any, items: Any) -> tuple[Any, Any]:
  """The log and item table of a folder of RecBole's atomic files; anything else stays what it is."""
  if not isinstance(source, str | Path) or not os.path.isdir(source):
    return source, items
  folder = Path(source)
  found = {kind: sorted([*folder.glob(f"*.{kind}"), *folder.glob(f"*.{kind}.gz")]) for kind in ("inter", "item")}
  if len(found["inter"]) != 1 or len(found["item"]) > 1:
    raise InputError(
      f"{folder}: expected a log, or a folder with one .inter file (RecBole's) and at most one .item file, found"
      f" {len(found['inter'])} and {len(found['item'])}; name the file"
    )
  return found["inter"][0], items if items is not None or not found["item"] else found["item"][0]


def prepare_source(
  source: Source, images: str | Path | None, output: Path, settings: PreparationSettings
) -> dict[str, Any]:
  """`prepare` of what is read by functions."""
  pictures = None if images is None else Pictures(local_path(images, flag="images"))
  folder = unfinished(output)
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  try:
    report = _fill(folder, source, pictures, settings, name=output.name)
    os.rename(folder, output)  # Whole or not there.
  except BaseException:
    shutil.rmtree(folder, ignore_errors=True)
    raise
  return report


def _fill(
  folder: Path, source: Source, pictures: Pictures | None, settings: PreparationSettings, *, name: str
) -> dict[str, Any]:
  quarantine = Quarantine(folder / "quarantine.jsonl")
  try:
    log = source.read_log(quarantine)
    say(f"{source.log}: {log.rows:,} rows; {log.columns}" + (f"; times: {log.unit}" if log.unit else ""))
    usable = _usable_items(log, source, pictures, settings.require) if settings.require else None
    user, item, time, place, steps, tied = select(log, settings, usable)
    users, user = by_first_row(user, place)
    order = np.argsort(user, kind="stable")
    user, item, place, time = user[order], item[order], place[order], None if time is None else time[order]
    wanted, items = by_first_row(item, place)
    names = [log.items[one] for one in wanted.tolist()]
    number, figures = write_items(
      folder / "items.jsonl.gz",
      names,
      records=source.read_items(quarantine),
      table=source.table,
      pictures=pictures,
      unseen=settings.unseen_items,
    )
  finally:
    quarantine.close()
  if source.table is not None:
    say(f"{source.table}: {source.columns}")
  write_histories(folder, [log.users[one] for one in users.tolist()], user, number[items], time)
  if source.read_vectors is not None:
    item_ids, _ = read_written(folder)
    assert item_ids is not None
    for modality, vectors in source.read_vectors(item_ids).items():
      np.save(folder / f"{modality}_features.npy", vectors)
  aside = {file: quarantine.of(file) for file in dict.fromkeys(file for file, _ in quarantine.counts)}
  if log.left_out:
    say(f"  left out for their rating or event: {log.left_out:,}")
  unused = {
    "items": source.unused + figures.unused,
    "pictures": 0 if pictures is None else len(pictures) - len(figures.pictures),
  }
  for sentence in _sentences(steps, figures, pictures, aside, tied, unused, settings):
    say(sentence)
  dataset = load_directory(folder)
  dataset = dataclasses.replace(dataset, name=name, source=str(folder))
  split = leave_one_out(dataset.interactions)
  report: dict[str, Any] = {
    "log": source.log,
    "item_table": source.table,
    "images": None if pictures is None else str(pictures.folder.absolute()),
    "columns": {"log": log.columns, "items": source.columns},
    "times": log.unit,
    "settings": {key: _plain(value) for key, value in dataclasses.asdict(settings).items()},
    "rows": log.rows,
    "left_out": log.left_out,
    "steps": [dataclasses.asdict(step) for step in steps],
    "quarantine": aside,
    "unused": unused,
    "unread": dict(figures.unread),
    "same_time": tied,
    "split_hash": split.split_hash,
  }
  write_json(folder / "preparation.json", report)
  write_card(folder, dataset, split, report, figures)
  _show(dataset, statistics(dataset, split))
  return report


def _usable_items(log: Log, source: Source, pictures: Pictures | None, require: Sequence[str]) -> np.ndarray:
  """Which items of a log have what is required of them, bool [I]; the item table is read for that alone.

  Raises:
    InputError: if nothing says it, or no item has it.
  """
  if source.table is None and ("metadata" in require or pictures is None):
    needed = "--items" if "metadata" in require else "--items or --images"
    raise InputError(f"--require={','.join(require)}: expected {needed}, which says what items have; give it")
  places = {item: place for place, item in enumerate(log.items)}
  usable = np.zeros(len(places), bool)
  known = np.zeros(len(places), bool)
  for record in source.read_items(Quarantine(Path(os.devnull))):  # What is set aside is told when all of it is read.
    place = places.get(record["id"], -1)
    if place >= 0:
      known[place], usable[place] = True, has_required(record, pictures, require)
  if "metadata" not in require:
    usable[~known] = [has_required({"id": log.items[place]}, pictures, require) for place in np.flatnonzero(~known)]
  if not usable.any():
    mend = "call pictures like the ids" if source.table is None else "say which column has their ids with --item_id"
    raise InputError(
      f"{source.log}: expected items with {' and '.join(require)} (--require), such as {log.items[0]!r} might be, found"
      f" none; {mend}, or leave --require out"
    )
  return usable


def _show(dataset: Dataset, figures: dict[str, Any]) -> None:
  lines = format_statistics(figures | {"source": "synthetic"}).splitlines()
  say("\n".join([f"data set {dataset.name}:", *lines[1:]]))


def _plain(value: Any) -> Any:
  return None if value == float("-inf") else list(value) if isinstance(value, tuple) else value


def select(
  log: Log, settings: PreparationSettings, usable: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray, list[Step], int]:
  """What of a log stays, user by user in time order.

  Args:
    log: that was read.
    settings: what is left out, and the rule for ties.
    usable: [I] bool, the items that have what is required; None where nothing is.

  Returns:
    Users, items, times and places in the log [n], users ascending; what was left after each step; and how many came at
    the same time as the one before of the same user.

  Raises:
    InputError: if nothing is left.
  """
  steps = [_step("rows that could be used", log.user, log.item)]
  rank = None
  if settings.ties == "item":
    order = np.argsort(np.array(log.items, object), kind="stable")
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    rank = ranks[log.item]
  places, _ = in_order(log.user, log.time, ties=settings.ties, item_rank=rank, seed=settings.seed)
  user, item, time = log.user[places], log.item[places], None if log.time is None else log.time[places]

  def keep(chosen: np.ndarray, name: str) -> None:
    nonlocal user, item, time, places
    if not chosen.all():
      user, item, places = user[chosen], item[chosen], places[chosen]
      time = None if time is None else time[chosen]
      steps.append(_step(name, user, item))

  if usable is not None:
    keep(usable[item], f"items with {' and '.join(settings.require)}")
  keep(repeated(user, item, least=settings.min_repeats), f"user and item at least {settings.min_repeats} times")
  keep(without_duplicates(user, item, time, rule=settings.duplicates), f"without duplicates ({settings.duplicates})")
  chosen, rounds = core(user, item, per_user=settings.min_per_user, per_item=settings.min_per_item)
  least = f"at least {settings.min_per_user} per user and {settings.min_per_item} per item"
  keep(chosen, f"{least} ({rounds} round{'s' if rounds > 1 else ''})")
  if not len(user):
    counts = "; ".join(f"{step.name}: {step.interactions} of {step.users} users, {step.items} items" for step in steps)
    raise InputError(
      f"expected interactions to be left after preparation, got none ({counts}); lower --min_per_user and"
      " --min_per_item, or give a longer log"
    )
  tied = 0 if time is None else int(np.sum((np.diff(user) == 0) & (np.diff(time) == 0)))
  return user, item, time, places, steps, tied


def by_first_row(numbers: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Numbers things anew, in the order of their first row that is left.

  Args:
    numbers: [n] int from 0.
    place: [n] int, where each stands in the log.

  Returns:
    The old numbers of the things that there are [m], in the new order; and the new ones [n] int64.
  """
  first = np.full(int(numbers.max()) + 1, np.iinfo(np.int64).max)
  np.minimum.at(first, numbers, place)
  there = np.flatnonzero(first < np.iinfo(np.int64).max)
  there = there[np.argsort(first[there])]
  new = np.empty(len(first), np.int64)
  new[there] = np.arange(len(there))
  return there, new[numbers]


def _step(name: str, user: np.ndarray, item: np.ndarray) -> Step:
  return Step(name, len(user), _distinct(user), _distinct(item))


def _distinct(numbers: np.ndarray) -> int:
  return int(np.count_nonzero(np.bincount(numbers))) if len(numbers) else 0


def write_histories(
  folder: Path, names: Sequence[str], user: np.ndarray, item: np.ndarray, time: np.ndarray | None
) -> None:
  """Writes `sequences.txt`, `timestamps.txt` and `users.txt`.

  Args:
    folder: where.
    names: [U] the users' ids.
    user: [n] int, ascending from 0 to U - 1.
    item: [n] int.
    time: [n] float64 seconds, or None.
  """
  starts = np.append(np.flatnonzero(np.diff(user, prepend=-1)), len(user))
  with open(folder / "users.txt", "w", encoding="utf-8", newline="\n") as file:
    file.writelines(f"{name}\n" for name in names)
  _write_lines(folder / "sequences.txt", starts, item)
  if time is not None:
    whole = bool(np.all((time == np.round(time)) & (np.abs(time) < 2**53)))  # Others are no integers of 64 bits.
    _write_lines(folder / "timestamps.txt", starts, time.astype(np.int64) if whole else time)


def _write_lines(path: Path, starts: np.ndarray, values: np.ndarray) -> None:
  """Writes a line a user, its number and its values, those of `values` from one start to the next."""
  with open(path, "w", encoding="utf-8", newline="\n") as file:
    for first in range(0, len(starts) - 1, _USERS):
      bounds = starts[first : first + _USERS + 1]
      texts = list(map(repr, values[bounds[0] : bounds[-1]].tolist()))
      places = (bounds - bounds[0]).tolist()
      file.writelines(
        f"{first + row} {' '.join(texts[places[row] : places[row + 1]])}\n" for row in range(len(places) - 1)
      )


def _sentences(
  steps: list[Step],
  figures: ItemFigures,
  pictures: Pictures | None,
  aside: dict[str, dict[str, int]],
  tied: int,
  unused: dict[str, int],
  settings: PreparationSettings,
) -> Iterable[str]:
  for step in steps:
    yield f"  {step.name}: {step.interactions:,} interactions of {step.users:,} users with {step.items:,} items"
  if tied:
    rule = {"file": "as in the file", "item": "by the item's id", "shuffle": f"shuffled by seed {settings.seed}"}
    yield f"  {tied:,} came at the same time as the one before them; their order is {rule[settings.ties]}"
  for file, reasons in aside.items():
    said = "; ".join(f"{count:,} with {reason}" for reason, count in reasons.items())
    yield f"  set aside in quarantine.jsonl: of {file} {said}"
  have = ", ".join(f"{field} {figures.have[field]:,}" for field in figures.have if figures.have[field])
  yield f"  of {figures.count:,} items have: {have or 'nothing but an id'}"
  for what, count in figures.unread.items():
    yield f"  not taken over: {count:,} {what}, such as {figures.unread_example[what]}"
  if unused["items"]:
    yield f"  items of the table without interactions: {unused['items']:,}, left out (--unseen_items keeps them)"
  if pictures is not None and figures.pictures and unused["pictures"]:
    yield f"  pictures of no item that is kept: {unused['pictures']:,} of {len(pictures):,}"
  if pictures is not None and not figures.pictures:
    yield f"warning: none of the {len(pictures)} pictures is of an item; call them like the ids, or give --image=COLUMN"
