"""The exceptions of this package, and how programs show them: as one line that says what is wrong and what to do."""

import errno
import sys
from typing import NoReturn

LONGEST_MESSAGE = 1000

# Local copies of what URLs name, by their paths: people are told of the URLs.
LOCAL_COPIES: dict[str, str] = {}

# Errors of a disk that is full, read-only, failing, or not ours to write to.
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def as_given(text: str) -> str:
  """The text with URLs in place of the paths of their local copies (see `utils.remote`)."""
  for path, url in LOCAL_COPIES.items():
    text = text.replace(path, url)
  return text


def printable(text: str) -> str:
  r"""The text on one line, with what would move a terminal's cursor, or that it cannot show, escaped as in "\x1b"."""

  def one(character: str) -> str:
    if character.isprintable():
      return character
    return " " if character.isspace() else character.encode("unicode_escape").decode()

  return "".join(map(one, text))


def shown(token: bytes | str) -> str:
  """A token as an error message quotes it: one line, at most 40 characters of it."""
  text = token.decode("utf-8", "replace") if isinstance(token, bytes) else token
  return repr(text if len(text) <= 40 else text[:40] + "...")


class InputError(ValueError):
  """Bad input, found before anything was computed or written.

  The message is one line: the file, row and field, what was expected, what came, and the way out. It quotes files that
  may hold anything, so it is made printable and short here. Programs print it without a traceback and exit with
  status 2.
  """

  def __init__(self, message: str):
    line = printable(as_given(message))
    super().__init__(line if len(line) <= LONGEST_MESSAGE else line[:LONGEST_MESSAGE] + "...")


class StorageError(RuntimeError):
  """What a run has to write could not be written; what was saved before is still there.

  Programs print it without a traceback and exit with status 1.
  """


class Diverged(FloatingPointError):
  """Training reached numbers that are not finite; the last checkpoint is from before that.

  Programs print it without a traceback and exit with status 1.
  """


def refuse(error: Exception, *, status: int = 2) -> NoReturn:
  """Ends a program with one line on standard error and a status."""
  print(f"error: {' '.join(printable(str(error)).split())}", file=sys.stderr)
  sys.exit(status)
