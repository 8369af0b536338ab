"""Item features: one array per modality, memory-mapped, checked and summarised a block of rows at a time."""

import hashlib
import mmap
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from bbqrec_jax.errors import InputError, printable, shown
from bbqrec_jax.utils.files import is_given, is_plain_name, open_array

# Features [N, D] and presence [N] of some items, each by modality.
Modalities = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]

# Features are float32 on the device, so that is what a number must fit in; NaN and infinity do not.
LARGEST = float(np.finfo(np.float32).max)

# Elements of a block: 32 MiB in float64, so that a file larger than memory can be checked.
BLOCK = 2**22

# Of a column's mean, the least share that its spread has where float32 resolves it; and the largest spread there.
_NARROW, _FAR = 1e-4, 1e30

# Files that a note names at most.
_MOST_NAMES = 10


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
  path: str | Path, *, mask_path: str | Path | None = None, num_items: int, may_lack: bool = False
) -> tuple[np.ndarray, np.ndarray]:
  """Opens and checks the features of one modality.

  Args:
    path: a `.npy` file, [N, D] of float16, float32 or float64.
    mask_path: a `.npy` file, [N] bool or 0/1 integers, whether item k has this modality; if it is None or not there,
      an item has the modality unless its row is all zero. The rows of items that lack it may hold anything.
    num_items: N.
    may_lack: whether all of the items may lack the modality.

  Returns:
    The features [N, D], memory-mapped in their own dtype, and present [N] bool.

  Raises:
    InputError: if a file is not what it should be, a number is not finite in float32, or no item has the modality
      where some must.
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
  present, absence, decides = np.zeros(num_items, bool), "write the row as zeros", path
  mask: np.ndarray | None = None
  if mask_path is not None and is_given(Path(mask_path)):
    decides = Path(mask_path)
    present = mask = _load_mask(decides, num_items)
    absence = f"mark it so in {decides.name}"
  for rows in row_blocks(features):
    block = features[rows]
    fits = np.abs(block, dtype=np.float64) <= LARGEST
    if mask is None:
      present[rows] = block.any(axis=1)
    else:
      fits |= ~mask[rows, None]
    if not fits.all():
      row, column = np.argwhere(~fits)[0]
      mend = "scale the column or, " if np.isfinite(block[row, column]) else ""
      raise InputError(
        f"{path} row {rows.start + row} column {column}: expected a finite float32 number, got {block[row, column]};"
        f" {mend}if the item lacks the modality, {absence}"
      )
  if not may_lack and not present.any():
    raise InputError(f"{decides}: expected features for some items, got none of {num_items}; leave this modality out")
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
    InputError: if that is so; see `files.is_plain_name`.
  """
  if not is_plain_name(name) or name in ("id", "fused"):
    raise InputError(
      f"{where}: expected a modality's name of at most 128 printable bytes, without slashes, not id or fused, got"
      f" {shown(name)}; rename it"
    )


def choose_modalities(found: Iterable[str], modalities: Iterable[str], *, path: str | Path) -> tuple[str, ...]:
  """The modalities to use: those asked for, in that order, or all that were found, if any, by name.

  Raises:
    InputError: if one that was asked for was not found or is named twice.
  """
  found, chosen = sorted(found), tuple(modalities)
  for name in chosen:
    if name not in found:
      raise InputError(
        f"{path}: expected --config.data.modalities to name some of those found, {', '.join(found) or 'none'},"
        f" separated by commas, got {name!r}; correct it, or add {name}_features.npy"
      )
  if len(set(chosen)) < len(chosen):
    raise InputError(f"--config.data.modalities: expected different names, got {', '.join(chosen)}; name each once")
  return chosen or tuple(found)


def _feature_files(folder: Path, tables: Collection[str] = ()) -> dict[str, Path]:
  """The `<modality>_features.npy` of a folder, by modality; each `has_<modality>.npy` must belong to one of them.

  Raises:
    InputError: if one does not.
  """
  suffix = "_features.npy"
  files = {path.name.removesuffix(suffix): path for path in sorted(folder.glob(f"?*{suffix}"))}
  for path in sorted(folder.glob("has_?*.npy")):
    name = path.stem.removeprefix("has_")
    if name in tables:
      raise InputError(
        f"{path}: expected {name}{suffix} beside it, but {name!r} is a column; leave the column's cell empty where an"
        " item lacks the modality, and remove the file"
      )
    if name not in files and not path.name.endswith(suffix):
      found = ", ".join(file.name for file in files.values()) or f"no NAME{suffix}"
      raise InputError(f"{path}: expected {name}{suffix} beside it, found {found}; rename the file, or remove it")
  return files


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
      file, or a `has_<modality>.npy` is not of a file.
  """
  tables = in_tables or {}
  files = _feature_files(folder, tables)
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


def unused_files(folder: Path, modalities: Iterable[str], texts: tuple[str, ...] = ()) -> tuple[str, ...]:
  """One line about the `.npy` and `.txt` files of a folder that are not read, as a misnamed one is not; or none.

  Args:
    folder: of the data.
    modalities: that are used.
    texts: the names of text files that are read where they are there.
  """
  read = {name for modality in modalities for name in (f"{modality}_features.npy", f"has_{modality}.npy")}
  found = {path.name for pattern in ("*.npy", "*.txt", "*.txt.gz") for path in folder.glob(pattern)}
  unused = sorted(found.difference(read, texts))
  if not unused:
    return ()
  more = f" and {len(unused) - _MOST_NAMES} more" if len(unused) > _MOST_NAMES else ""
  known = ", ".join(("NAME_features.npy", "has_NAME.npy", *texts))
  return (f"not used: {printable(', '.join(unused[:_MOST_NAMES]))}{more} (read are {known})",)


def load_new_items(folder: Path, widths: Mapping[str, int]) -> Modalities:
  """The features of new items, `<modality>_features.npy` with one row an item, and `has_<modality>.npy` where given.

  All of them may lack a modality, by rows of zeros or by that file, but not every modality.

  Args:
    folder: where they are.
    widths: of the known items' features, by modality.

  Returns:
    features [n, D] and present [n] bool of the n new items, by modality.

  Raises:
    InputError: if a modality is missing or damaged or of another width, their rows differ in number, or there is
      nothing but rows of zeros.
  """
  for name in widths:
    check_name(name, where="the tokenizer's modalities")  # Its artefact may come from anywhere.
  _feature_files(folder)
  features: dict[str, np.ndarray] = {}
  present: dict[str, np.ndarray] = {}
  count = None
  for name, width in widths.items():
    path = folder / f"{name}_features.npy"
    if not is_given(path):
      raise InputError(
        f"{path}: expected the {name} features of the new items, found nothing; if none of them has any, write zeros"
        f" of shape [items, {width}]"
      )
    if count is None:
      count = next(iter(open_array(path).shape), 0)
      if not count:
        raise InputError(f"{path}: expected a row for each new item, got none")
    features[name], present[name] = load_modality(
      path, mask_path=folder / f"has_{name}.npy", num_items=count, may_lack=True
    )
    if features[name].shape[1] != width:
      raise InputError(
        f"{path}: expected rows of {width} numbers as of the known items, got {features[name].shape[1]}; make them in"
        " the same way"
      )
  if not any(mask.any() for mask in present.values()):
    raise InputError(f"{folder}: expected features of some new items, got none in any of {', '.join(widths)}; add some")
  return features, present


def feature_widths(features: Mapping[str, np.ndarray]) -> dict[str, int]:
  """D of each modality's features [N, D], by modality."""
  return {name: array.shape[1] for name, array in features.items()}


def spread(features: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation of each column over the rows that are there.

  Two passes in float64: the deviations of float16 features around a large mean would vanish in one.

  Args:
    features: [N, D] float.
    present: [N] bool, at least one True.

  Returns:
    mean [D] and std [D], float64; the std of a column that is constant, as far as its dtype resolves it, is 0.
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
  resolved = 1e-14 if features.dtype.itemsize == 8 else 1e-7
  return mean, np.where(std > resolved * np.abs(mean), std, 0.0)


def suits_float32(mean: np.ndarray, std: np.ndarray) -> bool:
  """Whether float32 resolves every column of features with the `spread` (mean, std), each [D].

  It does not where a column is narrow: seconds since 1970 of one afternoon would be a handful of values. Nor near the
  ends of its range, where differences overflow, or numbers lose their digits.
  """
  return bool(np.all((std == 0) | ((std >= np.maximum(_NARROW * np.abs(mean), 1 / _FAR)) & (std <= _FAR))))


def standardization(features: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """What standardises features: subtract the one, divide by the other.

  Args:
    features: [N, D] float.
    present: [N] bool, at least one True.

  Returns:
    mean [D] and std [D], both of the dtype to do it in: float64 for float64 features and where float32 does not suit
    them, else float32. The std of a constant column is 1, or its mean where that is larger: dividing is always safe,
    and what rounding leaves of the column stays next to nothing.
  """
  mean, std = spread(features, present)
  dtype = np.float32 if features.dtype.itemsize < 8 and suits_float32(mean, std) else np.float64
  return mean.astype(dtype), np.where(std > 0, std, np.maximum(np.abs(mean), 1.0)).astype(dtype)


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
