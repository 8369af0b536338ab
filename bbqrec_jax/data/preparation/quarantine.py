"""Rows that cannot be used: set aside in a file with the reason, counted, and too many of them refused."""

import contextlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from bbqrec_jax.errors import InputError, shown

# Characters of a row that are kept.
_LONGEST = 1000


class Quarantine:
  """A file of rows that cannot be used, `{"file", "row", "reason", "text"}` a line; there only if there are any."""

  def __init__(self, path: Path):
    """Writes nothing yet.

    Args:
      path: of the file; one that is there is added to.
    """
    self.path = path
    self.counts: Counter[tuple[str, str]] = Counter()
    self._first: dict[tuple[str, str], tuple[int, str]] = {}
    self._file: Any = None

  def add(self, file: str, row: int, reason: str, text: object) -> None:
    """Sets one row aside.

    Args:
      file: that it is of.
      row: its number there; a table's header is row 1.
      reason: the same words for all rows of one kind.
      text: what the row, or the field, holds.
    """
    held = str(text)[:_LONGEST]
    if self._file is None:
      self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace")
    record = {"file": file, "row": int(row), "reason": reason, "text": held}
    self._file.write(json.dumps(record) + "\n")
    self.counts[file, reason] += 1
    self._first.setdefault((file, reason), (int(row), held))

  def of(self, file: str) -> dict[str, int]:
    """How many rows of a file there are, by reason, most first."""
    return {reason: count for (name, reason), count in self.counts.most_common() if name == file}

  def check(self, file: str, *, rows: int, most: float) -> None:
    """Refuses a file too many of whose rows are here.

    Args:
      file: its name.
      rows: how many it has.
      most: the share of them that may be here.

    Raises:
      InputError: if more are; says why, with the first row of each reason.
    """
    bad = sum(self.of(file).values())
    if bad <= most * rows:
      return
    reasons = []
    for reason, count in list(self.of(file).items())[:3]:
      row, text = self._first[file, reason]
      reasons.append(f"{count} with {reason}, the first in row {row}: {shown(text)}")
    raise InputError(
      f"{file}: expected at most {most:.3g} of the rows to be unusable, got {bad} of {rows} ({'; '.join(reasons)});"
      " correct them, say what the columns are (--help), or allow more with --max_bad"
    )

  def flush(self) -> None:
    """Sees to it that what was set aside so far is in the file."""
    if self._file is not None:
      self._file.flush()

  def reopen(self, *, before: int) -> None:
    """Goes on with a file that is there, as far as it tells of rows before one; a line cut short is none of it."""
    kept = []
    for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else ():
      with contextlib.suppress(ValueError, TypeError, KeyError):
        record = json.loads(line)
        if int(record["row"]) < before:
          kept.append(record)
    self.path.unlink(missing_ok=True)
    for record in kept:
      self.add(record["file"], record["row"], record["reason"], record["text"])

  def close(self) -> None:
    """Ends the file."""
    if self._file is not None:
      self._file.close()
