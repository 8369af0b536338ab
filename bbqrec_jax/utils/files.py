"""Checks of paths and files from anywhere: that a path can be used, and a file holds what its header declares.

Arrays are read without pickle, from a header that may declare no more than the file holds.
"""

import contextlib
import io
import math
import os
import re
import stat
import tempfile
import urllib.parse
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from bbqrec_jax.errors import InputError, as_given

# numpy reads no longer header than 10,000 characters; no more is ever read in search of one.
_LONGEST_HEADER = 2**14

# Bytes of one name in a path, and of a path: the usual 4,096 without what a run adds to its workdir's.
_LONGEST_NAME, _LONGEST_PATH = 255, 4096 - 256

# A path may hold these too, if it is absolute; at its beginning they are meant for a URL, or for another machine.
_REMOTE = re.compile(r"(file|gs|hdfs|https?|s3):|[^/]*:(?:/|$)", re.IGNORECASE)

# URLs that can be read and written, where that is asked for.
_URL = re.compile(r"(?!(?:file|local|https?):)[a-z][a-z0-9+.-]+://", re.IGNORECASE)

# What a path is for, as far as URLs can be meant (see `local_path`).
Use = Literal["folders", "read", "write", "run"]

# Absolute paths that orbax and tensorstore take as they are. They read [ ] * ? as patterns, "gs:/" anywhere and a first
# folder gs, s3, az or hf as a bucket, a backslash as a slash, and fail at two slashes first and at bytes of no UTF-8.
_PLAIN = re.compile(r"(?!//|/(az|gs|hf|s3)(/|$))[\w/ .,=+@~-]*", re.ASCII)


def is_url(text: str) -> bool:
  """Whether a text names something in an object store, or wherever else fsspec can read and write."""
  return _URL.match(text) is not None


def local_path(path: str | Path, *, flag: str, use: Use = "folders", without: str = "") -> Path:
  """The path that a flag, a config field or a caller gives, a "~" at its beginning being the home folder.

  As shells do, a "~" of nobody's stays what it is. A URL has a local copy (see `utils.remote`), whose path this is.

  Args:
    path: as it was given.
    flag: that gives it, for the message.
    use: what a URL is for: "read" copies what is there, "write" is for an output that is sent by `remote.deliver`,
      "run" for a workdir in `remote.mirrored`; "folders" takes none.
    without: of a URL, the beginning of names that need not be copied.

  Raises:
    InputError: if it is empty or a URL that cannot be used so, or no file system could have it: it holds a zero byte or
      half of a character, is too long, or begins in a current folder that is gone.
  """
  text = os.fsdecode(path)
  given = f"--{flag}={text if len(text) <= 200 else text[:200] + '...'}"
  if not text:
    raise InputError(f"{given}: expected a path, got nothing")
  try:
    held = "\0" not in text and bool(os.fsencode(text))
  except UnicodeEncodeError:
    held = False
  if not held:
    raise InputError(f"{given}: expected a path, got a character that none can hold; rename it, or use another")
  if use != "folders" and is_url(text) and len(text) <= _LONGEST_PATH:
    from bbqrec_jax.utils.remote import local_copy

    try:
      return local_copy(text, use=use, without=without)
    except InputError as error:
      raise InputError(f"{given}: {str(error).removeprefix(f'{text}: ')}") from error
  local = Path(os.path.expanduser(text))
  remote = _REMOTE.match(str(local))
  if remote and (remote[1] or "").lower() == "file":
    plain = urllib.parse.unquote(re.sub("^file:(//)?(localhost(?=/))?", "", text, flags=re.IGNORECASE))
    raise InputError(f"{given}: expected a path, got a URL; give the path alone, --{flag}={plain}")
  if remote:
    raise InputError(
      f"{given}: expected a path, got a URL, and only mounted file systems are read and written here; mount the bucket,"
      " as bbqrec launch does at /mnt/bbqrec, and give the folder there. If there really is a folder of such a name,"
      " give its absolute path"
    )
  try:
    absolute = os.fsencode(local.absolute())
  except FileNotFoundError:
    raise InputError(
      f"{given}: the current folder, which this path begins in, is gone; start in one that is there, or give an"
      " absolute path"
    ) from None
  longest = max(map(len, absolute.split(b"/")))
  if longest > _LONGEST_NAME or len(absolute) > _LONGEST_PATH:
    raise InputError(
      f"{given}: expected a path of at most {_LONGEST_PATH} bytes, {_LONGEST_NAME} a name, got {len(absolute)} and"
      f" {longest}; use a shorter one"
    )
  return local


@contextlib.contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
  """A path of a folder for libraries that take some characters for something else.

  Args:
    folder: an absolute path; it need not be there yet.

  Yields:
    The folder; or, if its path holds such characters, a link to it, which is gone afterwards.

  Raises:
    InputError: if there is no place for the link.
  """
  if _PLAIN.fullmatch(str(folder)):
    yield folder
    return
  with contextlib.ExitStack() as stack:
    try:
      link = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bbqrec_")), "folder")
      link.symlink_to(folder)
    except OSError as error:
      raise InputError(f"{_needs_a_link(folder)}, and none can be made: {error}") from error
    if not _PLAIN.fullmatch(str(link)):
      raise InputError(f"{_needs_a_link(folder)}, and that of {link.parent} is none; set TMPDIR=/tmp")
    yield link


def _needs_a_link(folder: Path) -> str:
  return f"{folder}: checkpoints in a folder of this name need a link in a temporary folder of a plain one"


def unfinished(path: Path) -> Path:
  """What a file or folder is called until it is whole."""
  return path.with_name(path.name + ".unfinished")


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
  """Refuses a folder that cannot be written to: it, or something on the way to it, is there and is none, or read-only.

  Args:
    folder: that is there or is to be made.
    flag: that names it, for the message.

  Raises:
    InputError: if that is so.
  """
  _check_place(folder, given=f"--{flag}={folder}")


def _check_place(folder: Path, *, given: str) -> None:
  nearest = next(path for path in (folder, *folder.parents) if is_given(path))
  if not os.path.isdir(nearest):
    raise InputError(f"{given}: expected a folder, or a place for one, but {nearest} is none; use another")
  if not os.access(nearest, os.W_OK | os.X_OK):
    raise InputError(f"{given}: {nearest} cannot be written to; mend its rights, or use another")


def check_new(output: Path) -> None:
  """Refuses an output that is there already, or cannot be.

  Raises:
    InputError: if that is so.
  """
  if is_given(output) or (is_url(as_given(str(output))) and _is_there(output)):
    raise InputError(f"{output} exists already: choose another --output")
  check_output(output)


def _is_there(output: Path) -> bool:
  from bbqrec_jax.utils.remote import exists

  return exists(output)


def check_output(output: Path, *, flag: str = "output") -> None:
  """Refuses an output that cannot be made; a file that is there is replaced.

  Args:
    output: the file or folder.
    flag: that names it, for the message.

  Raises:
    InputError: if that is so.
  """
  given = f"--{flag}={output}"
  if output.name in ("", "..") or os.path.isdir(output):
    raise InputError(f"{given}: expected the name of what is to be made, got a folder that is there")
  if len(os.fsencode(unfinished(output).name)) > _LONGEST_NAME:
    most = _LONGEST_NAME - len(unfinished(Path("x")).name) + 1
    raise InputError(f"{given}: expected a name of at most {most} bytes, as it is longer until it is whole; shorten it")
  _check_place(output.parent, given=given)


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
