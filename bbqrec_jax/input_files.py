"""Files from anywhere: what they declare is held against their size before memory is taken, and none of it is run.

Arrays are read without pickle, from a header that may declare no more than the file holds.
"""

import io
import math
import os
import stat
import warnings
import zipfile
from pathlib import Path

import numpy as np

from bbqrec_jax.errors import InputError

# numpy reads no longer header than 10,000 characters; no more is ever read in search of one.
_LONGEST_HEADER = 2**14


def expanded(path: str | Path) -> Path:
  """The path with a "~" at its beginning as the home folder; as shells do, one of nobody's stays what it is."""
  return Path(os.path.expanduser(path))


def is_given(path: Path) -> bool:
  """Whether there is anything at the path of an optional file: a link that leads nowhere is not an absent file."""
  return os.path.lexists(path)


def is_plain_name(name: str) -> bool:
  """Whether a name from a file can stand in the names of files and parameters.

  It is not if it is empty, longer than 128 bytes, hidden, or holds a separator of paths or what cannot be printed.
  """
  printable = name.isprintable() and not set("/\\") & set(name) and not name.startswith(".")
  return printable and 0 < len(name.encode()) <= 128


def is_whole(text: str) -> bool:
  """Whether the text can be written: JSON can escape half of a surrogate pair, which is no character."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def check_links(folder: Path) -> None:
  """Refuses a folder with links that lead out of it: what is written through one would land anywhere.

  Raises:
    InputError: if there is one.
  """
  inside = folder.resolve()
  for parent, folders, files in os.walk(folder):
    for path in (Path(parent, name) for name in (*folders, *files)):
      if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
        raise InputError(
          f"{path}: expected nothing in a workdir to lie outside of it, found a link to {os.readlink(path)}; put what"
          " it leads to in its place, or use another --workdir"
        )


def check_place(folder: Path, *, flag: str) -> None:
  """Refuses a folder that cannot be: it, or something on the way to it, is there and is none.

  Args:
    folder: that is there or is to be made.
    flag: that names it, for the message.

  Raises:
    InputError: if that is so.
  """
  nearest = next(path for path in (folder, *folder.parents) if is_given(path))
  if not nearest.is_dir():
    raise InputError(f"--{flag}={folder}: expected a folder, or a place for one, but {nearest} is none; use another")


def check_new(output: Path) -> None:
  """Refuses an output that is there already, or cannot be.

  Raises:
    InputError: if that is so.
  """
  if is_given(output):
    raise InputError(f"{output} exists already: choose another --output")
  check_place(output, flag="output")


def check_file(path: Path, *, what: str = "a file", most: int | None = None) -> int:
  """The size of a regular file in bytes.

  Args:
    path: the file, or a link to it.
    what: was expected there, for the message.
    most: bytes that it may have.

  Raises:
    InputError: if it is not there or cannot be looked at, is a folder, a pipe (which would be waited for without end)
      or a device, or is larger.
  """
  try:
    status = path.stat()
  except FileNotFoundError:
    raise InputError(f"{path}: expected {what}, found nothing; check the path") from None
  except OSError as error:
    raise InputError(f"{path}: expected {what}, got {error.strerror}; check the path and its rights") from None
  if not stat.S_ISREG(status.st_mode):
    came = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
    raise InputError(f"{path}: expected {what}, found {came}; put a regular file there")
  if most is not None and status.st_size > most:
    raise InputError(f"{path}: expected {what} of at most {most} bytes, got {status.st_size}; give a smaller one")
  return status.st_size


def _read_header(stream: io.BufferedIOBase, size: int) -> tuple[np.dtype, tuple[int, ...], str, int]:
  """Reads the header of `size` bytes of `.npy` -> (dtype, shape, order "C" or "F", where the numbers start).

  Raises:
    ValueError: if it declares anything but plain numbers that take up exactly the rest. (And whatever else comes of
      parsing a damaged header.)
  """
  head = io.BytesIO(stream.read(_LONGEST_HEADER))
  # Version 3 is for field names that are not latin-1, and plain numbers have none.
  readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
  version = np.lib.format.read_magic(head)
  if version not in readers:
    raise ValueError(f"format version {version}")
  with warnings.catch_warnings(action="ignore", category=UserWarning):  # Of headers that look like Python 2's.
    shape, fortran, dtype = readers[version](head)
  if dtype.hasobject or not dtype.itemsize:
    raise ValueError(f"dtype {dtype} holds no numbers")
  if any(length < 0 for length in shape) or head.tell() + math.prod(shape) * dtype.itemsize != size:
    raise ValueError(f"shape {shape} of {dtype} is not what {size} bytes hold")
  return dtype, shape, "F" if fortran else "C", head.tell()


def _check_flags(array: np.ndarray) -> np.ndarray:
  """The array; a bool that is neither 0 nor 1 counts differently in every function of NumPy.

  Raises:
    ValueError: if there is one.
  """
  if array.dtype == bool and array.size and array.reshape(-1, order="A").view(np.uint8).max() > 1:
    raise ValueError("a bool is neither 0 nor 1")
  return array


def open_array(path: Path) -> np.ndarray:
  """Memory-maps a `.npy` file, read-only.

  Raises:
    InputError: if the file is not a whole `.npy` file of plain numbers, and of nothing else.
  """
  size = check_file(path, what="a .npy file")
  try:
    with path.open("rb") as stream:
      dtype, shape, order, offset = _read_header(stream, size)
    if 0 in shape:
      return np.empty(shape, dtype)  # There is nothing to map.
    return _check_flags(np.memmap(path, dtype, mode="r", offset=offset, shape=shape, order=order))  # type: ignore[call-overload]
  except OSError as error:
    raise InputError(f"{path}: expected a .npy file, got {error.strerror}; check its rights") from None
  except Exception:  # A damaged header is parsed as a Python literal, and can fail in as many ways.
    raise InputError(
      f"{path}: expected a .npy file of plain numbers, got one that is corrupt, cut off, too long, of another format or"
      " of Python objects; write it again with numpy.save(path, array.astype('float32'))"
    ) from None


def read_array(path: Path) -> np.ndarray:
  """Reads a `.npy` file into memory.

  Raises:
    InputError: as `open_array`.
  """
  return np.array(open_array(path))


def read_archive(path: Path) -> dict[str, np.ndarray]:
  """Reads the arrays of an `.npz` file by name, as `numpy.savez` writes one.

  Raises:
    InputError: if the file is anything else. Members that declare more than the file holds, being compressed, are
      refused before they are read.
  """
  size = check_file(path, what="an .npz file")
  try:
    with zipfile.ZipFile(path) as archive:
      members = archive.infolist()
      if sum(member.file_size for member in members) > size:
        raise ValueError("its members are larger than the file")
      arrays: dict[str, np.ndarray] = {}
      for member in members:
        name = member.filename.removesuffix(".npy")
        if name in (member.filename, *arrays):
          raise ValueError(f"member {member.filename} is no array, or there twice")
        content = archive.read(member)
        dtype, shape, order, offset = _read_header(io.BytesIO(content), len(content))
        values = np.frombuffer(content, dtype, offset=offset) if len(content) > offset else np.empty(0, dtype)
        arrays[name] = _check_flags(values.reshape(shape, order=order)).copy()  # type: ignore[call-overload]
      return arrays
  except Exception as error:  # As for `open_array`, and a zip archive has more to be wrong.
    raise InputError(
      f"{path}: expected an .npz file of plain numbers, got one that is corrupt, compressed, of another format or of"
      f" Python objects ({error}); restore it"
    ) from None
