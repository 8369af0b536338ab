"""Reading whole text files, plain or gzip, so that whatever is wrong with them is one clear error."""

import gzip
import io
import os
import zlib
from pathlib import Path

from bbqrec_jax.errors import InputError, shown
from bbqrec_jax.utils.files import check_file, local_path

# Bytes of a text file, ten times those of half a billion interactions.
LARGEST = 2**36

# What a file may grow to in memory, compressed text or a sparse table: this many times its size, or FLOOR bytes.
GROWTH, FLOOR = 100, 2**26

# Separators of tables from elsewhere, the likeliest first.
_SEPARATORS = {b"\t": "tabs", b",": "commas", b";": "semicolons", b"|": "vertical bars", b" ": "blanks"}

# Bytes of a user's or an item's label. One longer one would make all labels of an array as long.
LONGEST_LABEL = 256


def require_folder(path: str | Path) -> Path:
  """The folder at `path`.

  Raises:
    InputError: if the path is empty, does not exist or is not a folder.
  """
  if not str(path):
    raise InputError(
      "no data folder was given: give --data=DIR (--config.data.path=DIR), or use --config.data.source=synthetic"
    )
  folder = local_path(path, flag="config.data.path", use="read")
  if not os.path.isdir(folder):
    came = "a file" if os.path.exists(folder) else "nothing"
    mend = "bbqrec prepare makes one of a log" if came == "a file" else "give --data=DIR (--config.data.path=DIR)"
    raise InputError(f"{path}: expected a folder of data, found {came}; {mend}")
  return folder


def read_text(path: Path) -> bytes:
  r"""The content of a UTF-8 text file, decompressed if its name ends in `.gz`.

  A byte-order mark and blank lines at the end are dropped, CRLF becomes LF, and a last line without a line end gets
  one. The text stays bytes: large files are split and parsed several times faster so, and in less memory.

  Returns:
    The bytes, valid UTF-8, empty or ending in a line feed.

  Raises:
    InputError: if the file cannot be read or is too large, is corrupt gzip, or is not UTF-8 (the line is named).
  """
  check_file(path, most=LARGEST)
  try:
    content = path.read_bytes()
  except OSError as error:
    raise InputError(f"{path}: expected a readable file, got {error.strerror}; check its rights") from None
  if path.suffix == ".gz":
    content = _decompress(path, content)
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
  end = len(content)
  while end and content[end - 1] in b" \t\r\n\v\f":
    end -= 1
  if not end:
    return b""
  line_end = content.find(b"\n", end)  # The last line keeps its own blanks: they may separate empty fields.
  return content + b"\n" if line_end < 0 else content[: line_end + 1]


def _decompress(path: Path, content: bytes) -> bytes:
  """Decompresses gzip a piece at a time, no further than a file of its size may reasonably go."""
  pieces, total = [], 0
  try:
    with gzip.open(io.BytesIO(content)) as stream:
      while piece := stream.read(2**18):
        pieces.append(piece)
        total += len(piece)
        check_growth(path, len(content), total)
  except (OSError, EOFError, zlib.error):
    raise InputError(f"{path}: expected gzip, got corrupt or cut-off data; copy or compress the file again") from None
  return b"".join(pieces)


def separator_of(line: bytes, *, expected: str) -> str:
  """What separates the fields of a line instead of what was expected, in words; "" if that does, or nothing."""
  found = [name for sign, name in _SEPARATORS.items() if sign in line]
  return "" if expected in found or not found else found[0]


def check_growth(path: Path, size: int, grown: int) -> None:
  """Refuses a file that would become far larger in memory than it is on disk.

  Args:
    path: the file, for the message.
    size: of the file, in bytes.
    grown: what it would come to, in bytes.

  Raises:
    InputError: if that is more than 64 MiB and more than a hundred times the file, or more than any file may have.
  """
  if grown > min(LARGEST, max(FLOOR, GROWTH * size)):
    raise InputError(
      f"{path}: expected no more than {GROWTH} times its {size} bytes, got at least {grown}, as of a file made to fill"
      " the memory; if it is right, give it uncompressed, or its features as .npy"
    )


def check_label(label: bytes, *, where: str) -> None:
  """Refuses a label that is too long.

  Raises:
    InputError: if it has more than 256 bytes; `where` says which file, line and field.
  """
  if len(label) > LONGEST_LABEL:
    raise InputError(f"{where}: expected at most {LONGEST_LABEL} bytes, got {len(label)}, {shown(label)}; shorten it")


def read_lines(path: Path) -> list[bytes]:
  """The lines of a text file without their line ends; see `read_text`."""
  return read_text(path).split(b"\n")[:-1]
