"""The one exception that means "what you gave me is wrong, and here is how to mend it", and how programs show it."""

import sys
from typing import NoReturn


class InputError(ValueError):
  """Bad input, found before anything was computed or written.

  The message is one line: the file, row and field, what was expected, what came, and the way out. Programs print it
  without a traceback and exit with status 2.
  """


def refuse(error: Exception) -> NoReturn:
  """Ends a program with one line on standard error and status 2."""
  print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
  sys.exit(2)
