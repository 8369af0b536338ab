"""Flags as absl parses them, with one line instead of a traceback where a config is wrong."""

import difflib
import re
from collections.abc import Collection

from absl import app, flags

from bbqrec_jax.errors import InputError, refuse


def parse_flags(argv: list[str], *, known: Collection[str] = ()) -> list[str]:
  """Parses a program's flags, `config` among them.

  Args:
    argv: the command line.
    known: the fields that `--config.field=value` may set; none named leaves that to the config.

  Returns:
    What is left of the command line. A config that cannot be used ends the program, saying why.
  """
  for argument in argv[1:] if known else ():
    field = re.match(r"--?config\.([^=]+)", argument)
    if field and field[1] not in known:
      close = difflib.get_close_matches(field[1], known, 1)
      meant = f"did you mean {close[0]}? " if close else ""
      refuse(InputError(f"config field {field[1]} is unknown: {meant}all fields are in bbqrec_jax/config.py"))
  try:
    rest = app.parse_flags_with_usage(argv)
    if flags.FLAGS.config is not None:
      flags.FLAGS.config.items()  # A config file that cannot be loaded is only missed when it is used.
    return rest
  except KeyError as error:
    refuse(InputError(f"the config cannot be used: {error} is neither a field nor a choice that its file offers"))
  except (AttributeError, TypeError, ImportError, OSError) as error:
    refuse(InputError(f"the config cannot be used: {error}"))
