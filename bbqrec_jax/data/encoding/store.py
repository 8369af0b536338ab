"""An array of features that is filled a batch at a time, and goes on where it was stopped."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.files import is_given, unfinished
from bbqrec_jax.utils.json_files import read_json, write_json

_LARGEST = float(np.finfo(np.float16).max)
NOTE = "features.json"


def made(folder: Path) -> dict[str, Any]:
  """What `features.json` says of the features of a folder, by modality."""
  path = folder / NOTE
  return read_json(path, mend="delete it and the features, and make them again") if is_given(path) else {}


def check_ours(folder: Path, name: str) -> None:
  """Refuses to replace features that something else made.

  Raises:
    InputError: if there are any.
  """
  path = folder / f"{name}_features.npy"
  if is_given(path) and name not in made(folder):
    raise InputError(
      f"{path}: expected features that bbqrec features made, found others, which stay: leave this modality out"
      f" (--{name}=none), or move the file away"
    )


def is_made(folder: Path, name: str, fingerprint: str) -> bool:
  """Whether the features of a modality are there, made from the same by the same."""
  noted = made(folder).get(name)
  return (
    isinstance(noted, dict)
    and noted.get("fingerprint") == fingerprint
    and is_given(folder / f"{name}_features.npy")
  )  # fmt: skip


def _is_array(path: Path, shape: tuple[int, ...]) -> bool:
  """Whether a file holds an array of a shape, whole."""
  try:
    return np.load(path, mmap_mode="r", allow_pickle=False).shape == shape
  except (OSError, ValueError, EOFError):
    return False


def fill(
  folder: Path,
  name: str,
  *,
  count: int,
  width: int,
  batches: Callable[[int], Iterator[tuple[np.ndarray, np.ndarray]]],
  note: dict[str, Any],
  mask: bool = False,
) -> np.ndarray:
  """Fills `NAME_features.npy`, float16, and notes how it was made.

  Args:
    folder: of the data set.
    name: of the modality.
    count: of items, N.
    width: D.
    batches: (first item) -> (features [n, D], present [n] bool) of the items from there on, in order.
    note: how it is made; its "fingerprint" decides whether what was begun is gone on with.
    mask: whether `has_NAME.npy` says which items have the modality; else those that lack it have rows of zeros.

  Returns:
    Which items have it, bool [N]; none where those that do have the same, which tells nothing: no file is left then.

  Raises:
    InputError: if a number does not fit into float16, or no item has the modality.
  """
  path, here = folder / f"{name}_features.npy", folder / f"has_{name}.npy"
  part, part_here, progress = unfinished(path), unfinished(here), folder / f"{name}_features.json.unfinished"
  done = 0
  if is_given(progress) and is_given(part) and is_given(part_here):
    begun = read_json(progress, mend="delete it, and the features are made from the beginning")
    fits = begun.get("fingerprint") == note["fingerprint"] and begun.get("shape") == [count, width]
    done = int(begun["done"]) if fits and _is_array(part, (count, width)) and _is_array(part_here, (count,)) else 0
  mode = "r+" if done else "w+"
  features = np.lib.format.open_memmap(part, mode=mode, dtype=np.float16, shape=None if done else (count, width))
  present = np.lib.format.open_memmap(part_here, mode=mode, dtype=bool, shape=None if done else (count,))
  with tqdm.tqdm(total=count, initial=done, desc=name, unit=" items", disable=None) as bar:
    for values, has in batches(done):
      if values.size and not np.all(np.abs(values[has]) <= _LARGEST):
        raise InputError(f"{name}: expected features that fit into float16, got one that is larger or no number")
      rows = slice(done, done + len(values))
      features[rows], present[rows] = np.where(has[:, None], values, 0), has
      done += len(values)
      features.flush()
      present.flush()
      write_json(progress, {"fingerprint": note["fingerprint"], "shape": [count, width], "done": done})
      bar.update(len(values))
  held = np.array(present)
  varied = _vary(features, held)
  del features, present
  if not varied:
    for leftover in (part, part_here, progress, path, here):
      leftover.unlink(missing_ok=True)
    if name in made(folder):
      write_json(folder / NOTE, {other: noted for other, noted in made(folder).items() if other != name})
  if not held.any():
    raise InputError(
      f"{folder}: expected {name} features of some items, found none to make; --{name}=none leaves it out"
    )
  if not varied:
    return np.zeros(count, bool)
  os.replace(part, path)
  if mask:
    os.replace(part_here, here)
  else:
    part_here.unlink()
    here.unlink(missing_ok=True)
  write_json(folder / NOTE, made(folder) | {name: note})
  progress.unlink()
  return held


def _vary(features: np.ndarray, held: np.ndarray) -> bool:
  """Whether any of the features [N, D] of the items that have them, bool [N], differ."""
  here = np.flatnonzero(held)
  blocks = (here[first : first + 8192] for first in range(0, len(here), 8192))
  return any(np.any(features[block] != features[here[0]]) for block in blocks)
