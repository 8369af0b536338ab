"""What the programs share: flags as absl parses them, and one line instead of a traceback."""

import contextlib
import difflib
import pathlib
import re
import signal
import sys
import warnings
from collections.abc import Collection, Iterator
from typing import Any

from absl import app, flags, logging

from bbqrec_jax.errors import STORAGE_ERRORS, Diverged, InputError, StorageError, refuse
from bbqrec_jax.interruption import Interrupted, heard_at_once, impatient


def _drop_echoes(unraisable: Any) -> None:
  """Leaves out of what Python tells of errors that nobody can catch those that are dealt with elsewhere.

  When a save fails, orbax closes an event loop that threads of tensorstore still answer, and each would tell so. A
  signal that finds Python collecting garbage is heard as soon as that is over (see `heard_at_once`).
  """
  error = unraisable.exc_value
  closed = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
  if not closed and not isinstance(error, Interrupted):
    sys.__unraisablehook__(unraisable)


def only_flags(argv: list[str]) -> Any:
  """The flags of a program that does not train: it takes nothing else, and logs no more than warnings."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  return flags.FLAGS


@contextlib.contextmanager
def training(workdir: pathlib.Path) -> Iterator[None]:
  """For programs that train: an interruption, a full disk or a wrong input ends them with one line.

  The exit status is 0 after SIGTERM, 130 after Ctrl-C, 2 for wrong input and 1 for anything else that went wrong.

  Args:
    workdir: where the program writes.
  """
  if not flags.FLAGS["verbosity"].present:
    # orbax tells of every file it writes; what fails there it also raises.
    logging.set_verbosity(logging.FATAL)
  sys.unraisablehook = _drop_echoes
  # Of writes that orbax gives up when one fails.
  warnings.filterwarnings("ignore", r"coroutine .* was never awaited", RuntimeWarning)
  try:
    with impatient(), heard_at_once():
      yield
  except InputError as error:
    refuse(error)
  except (StorageError, Diverged) as error:
    refuse(error, status=1)
  except OSError as error:
    if error.errno not in STORAGE_ERRORS:
      raise
    place = f" ({error.filename})" if error.filename else ""
    refuse(
      StorageError(
        f"{workdir}: could not write what a run leaves there: {error.strerror}{place}; mend that, and the same"
        " command goes on from the last checkpoint"
      ),
      status=1,
    )
  except Interrupted as stop:
    print(f"stopped by {stop}, everything is saved; the same command goes on from here", flush=True)
    sys.exit(0 if stop.signum == signal.SIGTERM else 128 + stop.signum)
  except KeyboardInterrupt:
    sys.exit(128 + signal.SIGINT)


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
