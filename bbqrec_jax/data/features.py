"""Item features: one array a modality, memory-mapped, checked and summarised a block of rows at a time."""

import hashlib
import mmap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from bbqrec_jax.errors import InputError, shown
from bbqrec_jax.input_files import is_given, is_plain_name, open_array

# Features [N, D] and presence [N] of some items, each by modality.
Modalities = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]

# Features are float32 on the device, so that is what a number must fit in; NaN and infinity do not.
LARGEST = float(np.finfo(np.float32).max)

# Elements of a block: 32 MiB in float64, so that a file larger than memory can be checked.
BLOCK = 2**22


def release(array: np.ndarray) -> None:
  """Lets go of the pages of a memory-mapped file that were read: the system's cache keeps them, the process does not.

  Nothing happens to an array that is not mapped, or that could be written to.
  """
  base = array.base
  while isinstance(base, np.ndarray):
    base = base.base
  if isinstance(base, mmap.mmap) and not array.flags.writeable and hasattr(base, "madvise"):
    base.madvise(mmap.MADV_DONTNEED)


def row_blocks(array: np.ndarray) -> Iterator[slice]:
  """Slices that cover the rows of a [N, D] array, each of about `BLOCK` elements; mapped pages are released behind."""
  step = max(1, BLOCK // max(1, array.shape[1]))
  for start in range(0, len(array), step):
    yield slice(start, start + step)
    release(array)


def load_modality(
  path: str | Path, *, mask_path: str | Path | None = None, num_items: int
) -> tuple[np.ndarray, np.ndarray]:
  """Opens and checks the features of one modality.

  Args:
    path: a `.npy` file, [N, D] of float16, float32 or float64.
    mask_path: a `.npy` file, [N] bool or 0/1 integers, whether item k has this modality; if it is None or not there,
      an item has the modality unless its row is all zero.
    num_items: N.

  Returns:
    The features [N, D], memory-mapped in their own dtype, and present [N] bool.

  Raises:
    InputError: if a file is not what it should be, a number is not finite in float32, or no item has the modality.
  """
  path = Path(path)
  features = open_array(path)
  if features.dtype.kind != "f" or features.dtype.itemsize > 8:
    raise InputError(
      f"{path}: expected float16, float32 or float64, got {features.dtype}; save array.astype('float32')"
    )
  if features.ndim != 2 or not features.shape[1]:
    raise InputError(f"{path}: expected shape [items, width], got {list(features.shape)}; save one row an item")
  if len(features) != num_items:
    raise InputError(
      f"{path}: expected {num_items} rows, one for each item of the catalogue, got {len(features)}; write row k for"
      " item k, all zero if the item lacks the modality"
    )
  present = np.zeros(num_items, bool)
  for rows in row_blocks(features):
    block = features[rows]
    fits = np.abs(block, dtype=np.float64) <= LARGEST
    if not fits.all():
      row, column = np.argwhere(~fits)[0]
      raise InputError(
        f"{path} row {rows.start + row} column {column}: expected a finite float32 number, got {block[row, column]};"
        " write the row as zeros if the item lacks the modality"
      )
    present[rows] = block.any(axis=1)
  if mask_path is not None and is_given(Path(mask_path)):
    path = Path(mask_path)
    present = _load_mask(path, num_items)
  if not present.any():
    raise InputError(f"{path}: expected features for some items, got none of {num_items}; leave this modality out")
  return features, present


def _load_mask(path: Path, num_items: int) -> np.ndarray:
  mask = open_array(path)
  if mask.dtype.kind not in "biu":
    raise InputError(f"{path}: expected bool or 0/1 integers, got dtype {mask.dtype}; save mask.astype(bool)")
  if mask.shape != (num_items,):
    raise InputError(
      f"{path}: expected shape [{num_items}], one flag for each item of the catalogue, got {list(mask.shape)}; write"
      " flag k for item k"
    )
  is_flag = (mask == 0) | (mask == 1)
  if not is_flag.all():
    row = int(np.argmin(is_flag))
    raise InputError(f"{path} row {row}: expected 0 or 1, got {mask[row]}; save mask.astype(bool)")
  return np.asarray(mask, bool)


def check_name(name: str, *, where: object) -> None:
  """Refuses a modality that could not be called so in files, or that every tokenizer has as a stream.

  Raises:
    InputError: if that is so; see `input_files.is_plain_name`.
  """
  if not is_plain_name(name) or name in ("id", "fused"):
    raise InputError(
      f"{where}: expected a modality's name of at most 128 printable bytes, without slashes, not id or fused, got"
      f" {shown(name)}; rename it"
    )


def choose_modalities(found: Iterable[str], modalities: Iterable[str], *, path: str | Path) -> tuple[str, ...]:
  """The modalities to use: those asked for, in that order, or all that were found, by name, if none was asked for.

  Raises:
    InputError: if one that was asked for was not found or is named twice, or there is none at all.
  """
  found, chosen = sorted(found), tuple(modalities)
  if not found:
    raise InputError(f"{path}: expected at least one modality, <modality>_features.npy, found none; add one")
  for name in chosen:
    if name not in found:
      raise InputError(
        f"{path}: expected --config.data.modalities to name some of {', '.join(found)}, got {name!r}; correct it, or"
        f" add {name}_features.npy"
      )
  if len(set(chosen)) < len(chosen):
    raise InputError(f"--config.data.modalities: expected different names, got {', '.join(chosen)}; name each once")
  return chosen or tuple(found)


def load_modalities(
  folder: Path, modalities: Iterable[str], *, num_items: int, in_tables: Mapping[str, np.ndarray] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Loads `<modality>_features.npy` and `has_<modality>.npy` of the chosen modalities.

  Args:
    folder: where they are.
    modalities: names, in order; empty for all that are found, by name.
    num_items: N.
    in_tables: further modalities that the source holds in its own tables, already checked: [N, D] float32 each.

  Returns:
    features and present, as in `load_modality`, by modality.

  Raises:
    InputError: as in `load_modality`, `choose_modalities` and `check_name`, or if a modality is in a table and in a
      file.
  """
  tables = in_tables or {}
  suffix = "_features.npy"
  files = {path.name.removesuffix(suffix): path for path in sorted(folder.glob(f"?*{suffix}"))}
  for name in [*files, *tables]:
    check_name(name, where=folder)
  for name in sorted(files.keys() & tables.keys()):
    raise InputError(f"{files[name]}: expected each modality once, {name!r} is also a column; remove one of the two")
  features: dict[str, np.ndarray] = {}
  present: dict[str, np.ndarray] = {}
  for name in choose_modalities([*files, *tables], modalities, path=folder):
    if name in tables:
      features[name], present[name] = tables[name], np.any(tables[name], axis=1)
    else:
      mask_path = folder / f"has_{name}.npy"
      features[name], present[name] = load_modality(files[name], mask_path=mask_path, num_items=num_items)
  return features, present


def load_new_items(folder: Path, names: tuple[str, ...]) -> Modalities:
  """The features of new items, `<modality>_features.npy` with one row an item, and `has_<modality>.npy` where given.

  Raises:
    InputError: if a modality is missing or damaged, or their rows differ in number.
  """
  for name in names:
    check_name(name, where="the tokenizer's modalities")  # Its artefact may come from anywhere.
  path = folder / f"{names[0]}_features.npy"
  shape = open_array(path).shape
  if not shape or not shape[0]:
    raise InputError(f"{path}: expected a row for each new item, got none")
  count = shape[0]
  return load_modalities(folder, names, num_items=count)


def standardization(features: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation of each column over the rows that are there.

  Two passes in float64: the deviations of float16 features around a large mean would vanish in one.

  Args:
    features: [N, D] float.
    present: [N] bool, at least one True.

  Returns:
    mean [D] and std [D], float32; the std of a constant column is 1, so that dividing by it is always safe.
  """
  count = np.count_nonzero(present)
  mean = np.zeros(features.shape[1], np.float64)
  for rows in row_blocks(features):
    mean += np.sum(features[rows][present[rows]], axis=0, dtype=np.float64)
  mean /= count
  variance = np.zeros_like(mean)
  for rows in row_blocks(features):
    variance += np.sum(np.square(features[rows][present[rows]].astype(np.float64) - mean), axis=0)
  std = np.sqrt(variance / count)
  # Rounding leaves a constant column a spread of about 1e-16 of its value; float32 resolves 1e-7 of it.
  varies = std > np.maximum(1e-7 * np.abs(mean), np.finfo(np.float32).tiny)
  return mean.astype(np.float32), np.where(varies, std, 1.0).astype(np.float32)


def features_hash(features: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray]) -> str:
  """16 hexadecimal digits that change with any feature, mask, dtype or name, but not with the order of modalities.

  Args:
    features: [N, D] float each, by modality.
    present: [N] bool each, by modality.
  """
  digest = hashlib.sha256()
  for name in sorted(features):
    array = features[name]
    digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
    for rows in row_blocks(array):
      digest.update(array[rows].tobytes())
    digest.update(present[name].astype(bool).tobytes())
  return digest.hexdigest()[:16]
