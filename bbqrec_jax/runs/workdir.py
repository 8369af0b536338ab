"""The JSON files of a workdir: the identity of its run, its config and its results; written, read and checked."""

import contextlib
import copy
import json
import os
import pathlib
from collections.abc import Collection, Iterator
from typing import Any

import ml_collections

from bbqrec_jax.config import CHANGEABLE, RunSettings, default_config, read_config
from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.interactions import Interactions
from bbqrec_jax.errors import STORAGE_ERRORS, InputError, as_given
from bbqrec_jax.recommender.evaluate import WITHOUT_HISTORY
from bbqrec_jax.recommender.settings import RecommenderSettings
from bbqrec_jax.tokenizer.settings import TokenizerSettings
from bbqrec_jax.utils.files import check_links, check_place, is_given, is_url, local_path, plain_path
from bbqrec_jax.utils.json_files import read_json, write_json
from bbqrec_jax.utils.lock import locked
from bbqrec_jax.utils.messages import warn
from bbqrec_jax.utils.settings import flatten, foreign_code, from_config, to_config

PATHS = ("data.path", "tokenizer.artefact", "init_from", "steps_of")  # Fields that name a folder.
# Of the figures of `statistics`: what tells one data set from another.
HASHES = ("split_hash", "features_hash", "ids_hash", "times_hash", "titles_hash")
_LARGEST = 2**63  # Of numbers in the files of a workdir; JSON itself knows no bounds.
REMAKE = "delete its folder, and the run's own command makes it again from the checkpoint"
PARTS = tuple(part + suffix for suffix in ("", WITHOUT_HISTORY) for part in ("popularity", "validation", "test"))
SHOWN = ("recall@1", "recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr", "coverage@10")


def with_absolute_paths(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A copy of a config whose folders are the same from whatever folder it is used; "~" is the home folder.

  URLs are what they are.

  Raises:
    InputError: if one is no path (see `local_path`).
  """
  placed = copy.deepcopy(config)
  given = {
    name: path for name, path in flatten(config).items() if name in PATHS and path and not is_url(os.fsdecode(path))
  }
  found = {name: local_path(path, flag=f"config.{name}").absolute() for name, path in given.items()}
  placed.update_from_flattened_dict({name: str(path) for name, path in found.items()})
  return placed


def check_workdir(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
  """Refuses a workdir that can be no folder, cannot be written to though it is to be, or is one that the run reads.

  Raises:
    InputError: if that is so.
  """
  if os.path.realpath(workdir) == os.path.sep:
    raise InputError(f"--workdir={workdir}: expected a folder for the run alone, got the root of all; use another")
  if not is_given(workdir / "results.json"):
    check_place(workdir, flag="workdir")
  with plain_path(workdir.absolute()):
    pass  # If checkpoints cannot be kept there, that comes to light now.
  for name, path in flatten(config).items():
    there = as_given(str(workdir)), os.path.realpath(workdir)
    if name in PATHS and path and (path == there[0] or os.path.realpath(path) == there[1]):
      raise InputError(f"--workdir={workdir} is the folder of config field {name}, which a run only reads; use another")


def _identity(fields: dict[str, Any]) -> dict[str, Any]:
  """What of the fields of a config, or of `run.json`, tells one run from another, as JSON gives it back."""
  # Where the data lies may change between two starts of one run; what it holds may not.
  fields = {name: value for name, value in fields.items() if name not in CHANGEABLE}
  artefact = fields.get("tokenizer.artefact")
  if artefact and isinstance(artefact, str) and not is_url(artefact):
    fields["tokenizer.artefact"] = str(pathlib.Path(artefact).absolute())  # It was not always written so.
  return json.loads(json.dumps(fields))


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
  """The names that two dictionaries do not both give the same value."""
  both = one.keys() & other.keys()
  return sorted(name for name in one.keys() | other.keys() if name not in both or one[name] != other[name])


@contextlib.contextmanager
def claimed(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  figures: dict[str, Any],
  dataset: Dataset,
  train: Interactions,
  *,
  done: bool,
) -> Iterator[None]:
  """Holds a workdir for a run that `claim` has written into it, against other starts of the same command.

  Args:
    workdir: of the run.
    config: of the run.
    figures: of its data.
    dataset: its data.
    train: of this, what is learned from.
    done: whether nothing is left to do there. Then nobody is kept out, and it need not be possible to write there.

  Raises:
    InputError: as `claim`, or if another process holds the workdir (see `locked`). Nothing is written then.
  """
  _check_run(workdir, _run(config, figures))
  if not done:
    _make(workdir)
  with contextlib.nullcontext() if done else locked(workdir):
    try:
      claim(workdir, config, figures)
      note_ids(workdir, dataset, train)
    except OSError as error:
      if not done:
        raise
      warn(f"{workdir}: what has changed of the config could not be noted there: {error.strerror}")
    yield


def claim(workdir: pathlib.Path, config: ml_collections.ConfigDict, figures: dict[str, Any]) -> None:
  """Writes what this run is into the workdir, or makes sure that the run found there is this one.

  Of the run found there the config is brought up to date, in the fields that may change.

  Raises:
    InputError: if the workdir belongs to a run with another config or other data; names the fields that differ. Or if
      a link in it leads out of it, or it cannot be made.
  """
  mine = _run(config, figures)
  _check_run(workdir, mine)
  _make(workdir)
  for file, value in ((workdir / "config.json", config.to_dict()), (workdir / "run.json", mine)):
    _keep_json(file, value)


def _run(config: ml_collections.ConfigDict, figures: dict[str, Any]) -> dict[str, Any]:
  """What `run.json` holds: the config and the data that tell one run from another."""
  return _identity(flatten(config)) | {f"data {name}": figures[name] for name in HASHES}


def _check_run(workdir: pathlib.Path, mine: dict[str, Any]) -> None:
  """Makes sure that a workdir holds nothing, or the run that `mine` tells of."""
  check_links(workdir)
  if is_given(workdir / "run.json"):
    theirs = _identity(read_json(workdir / "run.json"))
    differing = differences(theirs, mine)
    if differing:
      shown = ", ".join(f"{name} (there {theirs.get(name)!r}, now {mine.get(name)!r})" for name in differing)
      raise InputError(f"{workdir} holds another run, which differs in {shown}; use another --workdir")


def _make(workdir: pathlib.Path) -> None:
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    if error.errno in STORAGE_ERRORS and not isinstance(error, PermissionError):
      raise
    raise InputError(f"--workdir={workdir} cannot be made: {error.strerror}; use another") from error


def note_ids(workdir: pathlib.Path, dataset: Dataset, train: Interactions) -> None:
  """Writes `ids.json`: what the data calls the items and the users, in the order that everything else has them in.

  With the users stands from how many of their interactions the run learns.

  Raises:
    InputError: if the file is there, and damaged.
  """
  users = dataset.interactions.users.tolist()
  learned = dict(zip(train.users.tolist(), train.lengths.tolist(), strict=True))
  ids = {
    "items": dataset.item_ids.to_json(),
    "users": users,
    "learned_from": [learned.get(user, 0) for user in users],
  }
  _keep_json(workdir / "ids.json", ids)


def _keep_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  """Writes a file that is not there, or holds something else."""
  mend = "delete it, and the same command makes it again"
  if not is_given(path) or read_json(path, mend=mend) != json.loads(json.dumps(value)):
    write_json(path, value)


def format_results(results: dict[str, Any]) -> str:
  """The metrics as a table, a line a metric."""
  data = results["data"]
  split = "split" if data.get("split", "leave-one-out") == "leave-one-out" else f"{data['split']} split"
  lines = [
    f"{results['model']} on {data['name']}: {data['users']:,} users, {data['items']:,} items,"
    f" {data['interactions']:,} interactions, {split} {data['split_hash']}",
    f"{'':48s}   own history left out:",
    f"{'':12s}" + 2 * f"  {'popularity':>10s}  {'validation':>10s}  {'test':>10s}",
  ]
  for name in SHOWN:
    values = [results[part][name] for part in PARTS]
    lines.append(f"{name:12s}  " + "  ".join(f"{value:10.4f}" for value in values))
  seconds = results["seconds"]
  lines.append("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
  return "\n".join(lines)


def load_config(workdir: pathlib.Path, *, trusted: Collection[str] = ()) -> ml_collections.ConfigDict:
  """The config that a run wrote into its workdir.

  Args:
    workdir: of the run, from anywhere.
    trusted: Python modules outside this project that its parts may be imported from.

  Raises:
    InputError: if there is no run, it is of another version of the fields, a value is none that the field can have, it
      is not what `run.json` says of the run, or it names code that is not trusted.
  """
  path = workdir / "config.json"
  if not is_given(path):
    raise InputError(f"{path} does not exist: --workdir must be that of a run of bbqrec train")
  try:
    written = flatten(to_config(from_config(RunSettings, read_json(path), unchecked="")))
  except InputError as error:
    raise InputError(
      f"{path} does not fit this version ({error}); use the version that wrote it, or run its command again in another"
      " workdir"
    ) from error
  config = default_config()
  config.update_from_flattened_dict(written)
  noted = {name: value for name, value in read_json(workdir / "run.json").items() if not name.startswith("data ")}
  differing = differences(_identity(noted), _identity(flatten(config)))
  if differing:
    raise InputError(f"{path} and run.json beside it tell of different runs: {', '.join(differing)}; restore them")
  for stage, kind in (("recommender", RecommenderSettings), ("tokenizer", TokenizerSettings)):
    for name, code in foreign_code(kind, config[stage]):
      module = code.partition(":")[0]
      if module not in trusted:
        raise InputError(
          f"{path} field {stage}.{name} names code outside this project, {code!r}, and reading a workdir runs none: if"
          f" you trust it, say --trust={module}"
        )
  read_config(config)
  return config


def load_results(workdir: pathlib.Path) -> dict[str, Any]:
  """What `run` wrote of a finished run.

  Raises:
    InputError: if it is not there, or is not that.
  """
  path = workdir / "results.json"
  results = read_json(path, mend="delete it, and the run's own command makes it again")
  try:
    format_results(results)
    steps = results["best_step"], results["steps"]
    if not all(type(step) is int and 0 < step < _LARGEST for step in steps):
      raise ValueError(f"it was best at step {steps[0]!r} of {steps[1]!r}")
  except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
    raise InputError(
      f"{path}: expected the results of a run, got something else ({type(error).__name__}: {error}); delete it, and the"
      " run's own command makes it again"
    ) from error
  return results


def tokenizer_figure(folder: pathlib.Path, name: str) -> float:
  """What training the tokenizer in a folder took, which its `health.json` says: "seconds" or "skipped_steps".

  Raises:
    InputError: if it does not.
  """
  path = folder / "health.json"
  figure = read_json(path, mend=REMAKE).get(name)
  if isinstance(figure, bool) or not isinstance(figure, int | float) or not 0 <= figure < _LARGEST:
    raise InputError(f"{path} field {name}: expected a number of at least 0, got {figure!r}; {REMAKE}")
  return figure
