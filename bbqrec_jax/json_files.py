"""JSON files that are there whole or not at all."""

import json
import os
import pathlib
from typing import Any

from bbqrec_jax.errors import InputError
from bbqrec_jax.input_files import check_file

# Bytes of a file that is read; the largest that the programs write holds a number an item.
LARGEST = 2**28


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
    return value
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(
      f"{path}: expected a JSON file, could not read one ({error}); restore it or use another folder"
    ) from error
