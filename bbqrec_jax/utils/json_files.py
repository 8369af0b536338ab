"""JSON files, written atomically and with a checksum."""

import hashlib
import json
import os
import pathlib
from typing import Any

from bbqrec_jax.errors import InputError
from bbqrec_jax.utils import processes
from bbqrec_jax.utils.files import check_file, unfinished

# Bytes of a file that is read; the largest that the programs write holds the ids of all items and users.
LARGEST = 2**30

# Levels of lists and objects; what walks through a value may do so by recursion.
DEEPEST = 20


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  """Writes beside `path`, then moves into place: whoever reads, or resumes after a kill, never sees half a file.

  Of several processes the first writes, and the others do nothing.

  Args:
    path: of the file; its folder is made.
    value: what JSON can hold. The file has one field more, `checksum`.
  """
  if not processes.is_first():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  value = json.loads(json.dumps(value))
  with open(unfinished(path), "w", encoding="utf-8") as file:
    file.write(json.dumps(value | {"checksum": checksum(value)}, indent=2) + "\n")
    file.flush()
    os.fsync(file.fileno())  # Or a power cut might leave the new name with nothing behind it.
  os.replace(unfinished(path), path)


def read_json(path: pathlib.Path, *, mend: str = "restore it from a copy, or use another folder") -> dict[str, Any]:
  """What a file of `write_json` holds.

  Args:
    path: of the file.
    mend: what to do about a damaged one.

  Raises:
    InputError: if the file is missing, is not a JSON object, or is not what was written.
  """
  check_file(path, what="a JSON file", most=LARGEST)
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
      raise ValueError(f"it holds a {type(value).__name__}, no object")
    if _is_deep(value):
      raise ValueError(f"it is nested deeper than {DEEPEST} levels")
    written = value.pop("checksum", None)
    if written != checksum(value):
      raise ValueError(f"its checksum is {written}, that of what it holds {checksum(value)}: it was changed")
    return value
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f"{path}: expected a JSON file, could not read one ({error}); {mend}") from error


def checksum(value: dict[str, Any]) -> str:
  """16 hexadecimal digits that change with any name or value."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _is_deep(value: Any) -> bool:
  level = [value]
  for _ in range(DEEPEST):
    holders = [one for one in level if isinstance(one, dict | list)]
    level = [below for one in holders for below in (one.values() if isinstance(one, dict) else one)]
  return any(isinstance(one, dict | list) for one in level)
