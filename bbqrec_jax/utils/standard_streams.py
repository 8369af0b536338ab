"""Standard streams that printing never fails on, though they be closed, a broken pipe, a full disk or ASCII only."""

import contextlib
import errno
import io
import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from bbqrec_jax.errors import StorageError, refuse

_NARROWEST = 20  # Columns of a terminal in which help can be wrapped and a progress bar drawn.


class _LastingFile(io.FileIO):
  """A file descriptor that is replaced by the null device at the first write that fails.

  Attributes:
    lost: the error of that write; None while all succeeded.
  """

  lost: OSError | None = None

  def write(self, data: Any, /) -> int:
    """The number of bytes written; all, once they are written nowhere."""
    try:
      return super().write(data)
    except OSError as error:
      self.lost = error
      null = os.open(os.devnull, os.O_WRONLY)
      os.dup2(null, self.fileno())
      os.close(null)
      return len(data)


def lasting(stream: TextIO) -> tuple[TextIO, _LastingFile]:
  r"""A text stream on the descriptor of another that raises nothing, and the file that tells what became of it.

  What the encoding lacks is written escaped, as in "\u0434", where nothing else was chosen (`PYTHONIOENCODING`).
  """
  raw = _LastingFile(stream.fileno(), "w", closefd=False)
  errors = "backslashreplace" if stream.errors in (None, "strict", "surrogateescape") else stream.errors
  return io.TextIOWrapper(io.BufferedWriter(raw), encoding=stream.encoding, errors=errors, line_buffering=True), raw


@contextlib.contextmanager
def lasting_streams(*, needed: bool = True) -> Iterator[None]:
  """For programs: no failure of a standard stream ends the program.

  A closed stream is replaced by the null device, so that no other file gets its descriptor, which libraries write to. A
  broken pipe, as in `| head -1`, is no error: the program runs to its end with its usual status.

  Args:
    needed: whether what is printed is what the program is for: if it could not be written for another reason, the
      program ends with one line and status 1; otherwise with a warning.
  """
  files = {}
  for number, name in enumerate(("stdin", "stdout", "stderr")):
    try:
      os.fstat(number)
    except OSError:
      os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # The lowest free number, which is this one.
    stream = getattr(sys, name)
    if stream is not getattr(sys, f"__{name}__"):
      continue  # Somebody's own.
    stream = stream or os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False)
    if number:
      stream, files[name] = lasting(stream)
    setattr(sys, name, stream)
  if shutil.get_terminal_size().columns < _NARROWEST:
    os.environ["COLUMNS"] = str(_NARROWEST)
  try:
    yield
  except SystemExit as end:
    if end.code:
      raise
  sys.stdout.flush()
  lost = files["stdout"].lost if "stdout" in files else None
  if lost is None or lost.errno == errno.EPIPE:
    return
  what = f"standard output could not be written: {lost.strerror}"
  if needed:
    refuse(StorageError(what), status=1)
  print(f"warning: {what}; that changes nothing of the run", file=sys.stderr)
