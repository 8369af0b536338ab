"""JSON files that are there whole or not at all."""

import json
import os
import pathlib
from typing import Any

from bbqrec_jax.errors import InputError
from bbqrec_jax.input_files import check_file

# Bytes of a file that is read; the largest that the programs write holds a number an item.
LARGEST = 2**28

# Levels of lists and objects; what walks through a value may do so by recursion.
DEEPEST = 20


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes beside `path`, then moves into place: whoever reads, or resumes after a kill, never sees half a file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_name(path.name + ".unfinished")
  unfinished.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
  os.replace(unfinished, path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """What a file of `write_json` holds.

  Raises:
    InputError: if the file is missing or is not a JSON object.
  """
  check_file(path, what="a JSON file", most=LARGEST)
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
      raise ValueError(f"it holds a {type(value).__name__}, no object")
    if _is_deep(value):
      raise ValueError(f"it is nested deeper than {DEEPEST} levels")
    return value
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(
      f"{path}: expected a JSON file, could not read one ({error}); restore it or use another folder"
    ) from error


def _is_deep(value: Any) -> bool:
  level = [value]
  for _ in range(DEEPEST):
    holders = [one for one in level if isinstance(one, dict | list)]
    level = [below for one in holders for below in (one.values() if isinstance(one, dict) else one)]
  return any(isinstance(one, dict | list) for one in level)
