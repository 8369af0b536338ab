"""A grid of runs: every system on every data set with every seed, each resumable, with the tables that compare them."""

import ast
import copy
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections

from bbqrec_jax.config import CHANGEABLE
from bbqrec_jax.data.sources import recognise_source
from bbqrec_jax.errors import InputError, as_given
from bbqrec_jax.presets import load_config
from bbqrec_jax.recommender.settings import needs_semantic_ids
from bbqrec_jax.runs.compare import compare, to_markdown
from bbqrec_jax.runs.run import of_any_recommender, run, tokenize
from bbqrec_jax.utils.json_files import write_json
from bbqrec_jax.utils.messages import say
from bbqrec_jax.utils.settings import flatten

_OF_A_MACHINE = ("data.path", "tokenizer.artefact")  # Fields of a config that say where, not what.


class System(NamedTuple):
  """A config under a name.

  Attributes:
    name: of its folder, and in tables.
    config: without data and seed.
  """

  name: str
  config: ml_collections.ConfigDict


def parse_system(text: str) -> System:
  """A system from "CONFIG" or "NAME: CONFIG field=value ...", a config being a preset, FILE or FILE:CHOICE.

  Raises:
    InputError: if there is no such config or field, the value does not suit it, or it has no name of its own.
  """
  name, colon, rest = text.partition(": ") if ": " in text else ("", "", text)
  base, *changes = re.split(r"\s+(?=[a-z0-9_.]+=)", rest.strip())
  name = name.strip() if colon else base
  if not colon and (changes or not base.isidentifier()):
    raise InputError(f"--system={text!r}: a file or changes need a name: --system='NAME: {rest.strip()}'")
  if not re.fullmatch(r"[A-Za-z0-9_.+-]+", name) or name.startswith(".") or name.isdecimal():
    raise InputError(f"--system={text!r}: expected a name of letters, digits, '_', '-', '+' or '.', got {name!r}")
  try:
    config = load_config(base)
  except InputError as error:
    raise InputError(f"--system={text!r}: {error}") from None
  for change in changes:
    field, _, value = change.partition("=")
    try:
      config.update_from_flattened_dict({field: _value(value.strip())})
    except (KeyError, AttributeError, TypeError, ValueError) as error:
      raise InputError(f"--system={text!r}: {change!r} suits no field of the config ({error})") from None
  return System(name, config)


def _value(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def cell_config(system: System, data: pathlib.Path, seed: int) -> ml_collections.ConfigDict:
  """The config of one run of the grid."""
  config = copy.deepcopy(system.config)
  config.data.path, config.data.source = as_given(str(data)), recognise_source(data)
  config.seed = seed
  return config


def run_grid(
  systems: Sequence[System],
  data: Mapping[str, pathlib.Path],
  seeds: Sequence[int],
  workdir: pathlib.Path,
  *,
  records: pathlib.Path | None = None,
) -> dict[str, str]:
  """Does what is not done yet, seed by seed, so that a grid which is stopped has whole columns.

  Systems whose tokenizers are configured alike share one per data set and seed.

  Args:
    systems: by distinct names.
    data: folders of data sets, by name.
    seeds: of everything random.
    workdir: gets DATA/SYSTEM/SEED, each the workdir of a run, and DATA/tokenizers/SEED.
    records: a folder that gets DATA-SYSTEM-SEED.json of every run; None: none.

  Returns:
    A Markdown table per data set, whose reference is the first system.

  Raises:
    InputError: as `run`, and if two systems have one name.
  """
  names = [system.name for system in systems]
  for name in names:
    if names.count(name) > 1 or name == "tokenizers":
      raise InputError(f"--system: expected a name of its own for each, and not 'tokenizers'; got {name!r}")
  cells = [
    (seed, name, system, cell_config(system, data[name], seed)) for seed in seeds for name in data for system in systems
  ]
  for number, (seed, name, system, config) in enumerate(cells, start=1):
    folder = workdir / name / system.name / str(seed)
    say(f"grid: run {number} of {len(cells)}, {system.name} on {name} with seed {seed}, in {folder}")
    if needs_semantic_ids(config) and not config.tokenizer.artefact:
      config.tokenizer.artefact = str(_tokenizer(config, workdir / name / "tokenizers" / str(seed)))
    results = run(config, folder)
    if records is not None:
      write_record(records / f"{name}-{system.name}-{seed}.json", results, config, system=system.name)
    jax.clear_caches()  # Programs of one run are of no use to the next.
  tables = {}
  for name in data:
    done = {system.name: [workdir / name / system.name / str(seed) for seed in seeds] for system in systems}
    tables[name] = to_markdown(*compare(done, reference=names[0]), reference=names[0])
  return tables


def _tokenizer(config: ml_collections.ConfigDict, folder: pathlib.Path) -> pathlib.Path:
  """The artefact of the config's tokenizer, trained unless another system has asked for the same one."""
  alone = of_any_recommender(config)
  fields = {field: value for field, value in flatten(alone).items() if field not in CHANGEABLE}
  shared = folder / hashlib.sha256(json.dumps(sorted(fields.items())).encode()).hexdigest()[:8]
  tokenize(alone, shared)
  return (shared / "tokenizer").absolute()


def write_record(path: pathlib.Path, results: Mapping[str, Any], config: Any, *, system: str) -> None:
  """Keeps what a run reached, with all that is needed to do it again, as JSON."""
  device = jax.devices()[0]
  path.parent.mkdir(parents=True, exist_ok=True)
  write_json(
    path,
    {
      "data": results["data"]["name"],
      "split_hash": results["data"]["split_hash"],
      "system": system,
      "seed": config.seed,
      **{part: results[part] for part in ("test", "validation", "test_without_history")},
      "parameters": results.get("parameters"),
      "best_step": results["best_step"],
      "seconds": results["seconds"],
      "device": f"{jax.device_count()} x {device.device_kind}",
      "config": {field: value for field, value in flatten(config).items() if field not in _OF_A_MACHINE},
    },
  )
