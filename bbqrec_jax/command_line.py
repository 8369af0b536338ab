"""What the programs share: flags as absl parses them, and one line instead of a traceback."""

import contextlib
import difflib
import itertools
import pathlib
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Collection, Iterator
from typing import Any

from absl import flags, logging

from bbqrec_jax.errors import STORAGE_ERRORS, Diverged, InputError, StorageError, refuse
from bbqrec_jax.input_files import check_file, expanded
from bbqrec_jax.interruption import Interrupted, heard_at_once, impatient

# The flags that functions here define belong to the programs that call them, whose --help shows them.
flags.disclaim_key_flags()


def _drop_echoes(unraisable: Any) -> None:
  """Leaves out of what Python tells of errors that nobody can catch those that are dealt with elsewhere.

  When a save fails, orbax closes an event loop that threads of tensorstore still answer, and each would tell so. A
  signal that finds Python collecting garbage is heard as soon as that is over (see `heard_at_once`).
  """
  error = unraisable.exc_value
  closed = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
  if not closed and not isinstance(error, Interrupted):
    sys.__unraisablehook__(unraisable)


def quiet_flags() -> Any:
  """The flags of a program that does not train: it logs no more than warnings."""
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


@contextlib.contextmanager
def writing(output: pathlib.Path) -> Iterator[None]:
  """For programs that do not train: a place that cannot be written to ends them with one line and status 1."""
  try:
    yield
  except OSError as error:
    refuse(StorageError(f"{output} could not be written: {error.strerror}"), status=1)


def define_path(name: str, help_text: str) -> None:
  """Defines a flag whose value is a path; "~" is the home folder, as shells leave it alone after "="."""
  flags.DEFINE(_PathParser(), name, None, help_text, serializer=flags.ArgumentSerializer())


def define_run_flags() -> None:
  """Defines the flags of a program that restores a finished run."""
  define_path("workdir", "The workdir of a finished run.")
  define_path("data", "The folder of the run's data, where that has moved since.")
  flags.DEFINE_list("trust", [], "Python modules of yours that the run's config may name its head or backbone from.")
  flags.mark_flag_as_required("workdir")


class _PathParser(flags.ArgumentParser):
  """An empty path would be the current folder."""

  syntactic_help = "a path"

  def parse(self, argument: Any) -> pathlib.Path:
    """The path with its "~" expanded."""
    if not str(argument):
      raise ValueError("expected a path")
    return expanded(argument)


def parse_flags(argv: list[str], *, known: Collection[str] = ()) -> list[str]:
  """Parses a program's flags; what is wrong with them, or with the config that they name, ends it with one line.

  Args:
    argv: the command line.
    known: the fields that `--config.field=value` may set; none named leaves that to the config.

  Returns:
    The name of the program: nothing but flags may follow it.
  """
  for argument in argv[1:] if known else ():
    field = re.match(r"--?config\.([^=]+)", argument)
    if field and field[1] not in known:
      close = difflib.get_close_matches(field[1], known, 1)
      meant = f"did you mean {close[0]}? " if close else ""
      refuse(InputError(f"config field {field[1]} is unknown: {meant}all fields are in bbqrec_jax/config.py"))
  argv = [re.sub(r"^(--?config=)(~.*)", lambda found: f"{found[1]}{expanded(found[2])}", word) for word in argv]
  given = _given_config(argv) if "config" in flags.FLAGS else ""
  try:
    if given:
      check_file(pathlib.Path(given.partition(":")[0]), what="a config file")
    with warnings.catch_warnings():
      # Where the environment makes errors of warnings: those that ml_collections gives rise to are nobody's here.
      warnings.simplefilter("ignore", DeprecationWarning)
      rest = flags.FLAGS(argv)
    if given:
      flags.FLAGS.config.items()  # What is no config is only missed when it is used.
  except flags.Error as error:
    refuse(InputError(_of_config(error, given) if f"flag --config={given}: " in str(error) else _of_flag(error)))
  except InputError as error:
    refuse(error)
  except Exception as error:  # A config file is a program, which can fail in any way.
    refuse(InputError(_of_config(error, given)))
  if len(rest) > 1:
    refuse(InputError(f"unexpected argument {rest[1]!r}: every argument is a flag, --name=value; --help lists them"))
  return rest


def _given_config(argv: list[str]) -> str:
  """What `--config` names, FILE or FILE:CHOICE; "" where it is not there."""
  for word, following in itertools.pairwise([*argv, ""]):
    found = re.match(r"--?config(?:=(.*))?$", word)
    if found:
      return following if found[1] is None else found[1]
  return ""


def _of_flag(error: flags.Error) -> str:
  """What is wrong with a flag."""
  text = re.sub(r"flag (--\w+)=None: Flag --\w+ must have a value other than None\.", r"\1 is needed", str(error))
  given = re.match(r"flag (--([^=]+)=.*?): ", text, re.DOTALL)
  if given:
    parser = flags.FLAGS[given[2]].parser
    kind = "true or false" if parser.flag_type() == "bool" else parser.syntactic_help
    text = f"{given[1]}: expected {kind}" if kind else text
  where = "all fields are in bbqrec_jax/config.py" if "--config." in text else "--help lists the flags"
  return "; ".join([*text.rstrip(".? ").splitlines(), where])


def _of_config(error: BaseException, given: str) -> str:
  """What is wrong with the config file that `--config` names, or with a field that is set on the command line."""
  while error.__context__ and (isinstance(error, flags.Error) or "whilst parsing config file" in str(error)):
    error = error.__context__  # What absl and ml_collections made an error of.
  file, _, choice = given.partition(":")
  told = re.sub(r"""["']?(Key .*?)\. Other fields present.*""", r"\1", str(error), flags=re.DOTALL)
  if isinstance(error, InputError):
    return f"--config={given}: {told}"
  if choice and told.startswith("get_config() takes 0 positional arguments"):
    return f"--config={given}: {file} offers no choices, got {choice!r}; give --config={file}"
  if isinstance(error, KeyError | AttributeError) and " " not in told:
    name = told.strip("\\\"'")
    return f"--config={given}: {name!r} is neither a field nor a choice that the file offers"
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(file)]
  where = f" (line {lines[-1]})" if file and lines else ""
  return f"--config={given} cannot be used: {type(error).__name__}: {told}{where}"
