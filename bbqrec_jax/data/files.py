"""Reading whole text files, plain or gzip, so that whatever is wrong with them is one clear error."""

import gzip
import zlib
from pathlib import Path

from bbqrec_jax.errors import InputError


def shown(token: bytes | str) -> str:
  """A token as an error message quotes it: one line, at most 40 characters of it."""
  text = token.decode("utf-8", "replace") if isinstance(token, bytes) else token
  return repr(text if len(text) <= 40 else text[:40] + "...")


def require_folder(path: str | Path) -> Path:
  """The folder at `path`.

  Raises:
    InputError: if the path is empty, does not exist or is not a folder.
  """
  if not str(path):
    raise InputError("no data folder was given: set --config.data.path=DIR, or use --config.data.source=synthetic")
  folder = Path(path)
  if not folder.is_dir():
    came = "a file" if folder.exists() else "nothing"
    raise InputError(f"{path}: expected a folder of data, found {came}; set --config.data.path=DIR")
  return folder


def read_text(path: Path) -> bytes:
  r"""The content of a UTF-8 text file, decompressed if its name ends in `.gz`.

  A byte-order mark is dropped, CRLF becomes LF, and a last line without a line end gets one. The text stays bytes:
  large files are split and parsed several times faster so, and in less memory.

  Returns:
    The bytes, valid UTF-8, empty or ending in a line feed.

  Raises:
    InputError: if the file cannot be read, is corrupt gzip, or is not UTF-8 (the line is named).
  """
  try:
    content = path.read_bytes()
  except OSError as error:
    raise InputError(f"{path}: expected a readable file, got {error.strerror}; check its rights") from None
  if path.suffix == ".gz":
    try:
      content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error):
      raise InputError(f"{path}: expected gzip, got corrupt or cut-off data; copy or compress the file again") from None
  content = content.removeprefix(b"\xef\xbb\xbf")
  # UTF-16, and binary files in general, are full of zero bytes, which are valid UTF-8.
  bad = content.find(b"\0")
  if bad < 0 and not content.isascii():
    try:
      content.decode("utf-8")
    except UnicodeDecodeError as error:
      bad = error.start
  if bad >= 0:
    line = content.count(b"\n", 0, bad) + 1
    raise InputError(f"{path} line {line}: expected UTF-8 text, got byte {content[bad]:#04x}; save the file as UTF-8")
  content = content.replace(b"\r\n", b"\n")
  return content if not content or content.endswith(b"\n") else content + b"\n"


def read_lines(path: Path) -> list[bytes]:
  """The lines of a text file without their line ends; see `read_text`."""
  return read_text(path).split(b"\n")[:-1]
