"""The one exception that means "what you gave me is wrong, and here is how to mend it"."""


class InputError(ValueError):
  """Bad input, found before anything was computed or written.

  The message is one line: the file, row and field, what was expected, what came, and the way out. Programs print it
  without a traceback and exit with status 2.
  """
