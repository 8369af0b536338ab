"""What the commands share: flags, which absl parses, and errors as one line instead of a traceback."""

import ast
import contextlib
import dataclasses
import difflib
import io
import itertools
import os
import pathlib
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

from bbqrec_jax.errors import STORAGE_ERRORS, Diverged, InputError, StorageError, as_given, refuse
from bbqrec_jax.utils.files import Use, check_file, is_url, local_path
from bbqrec_jax.utils.standard_streams import lasting_streams

# The flags that functions here define belong to the programs that call them, whose --help shows them.
flags.disclaim_key_flags()


def _drop_echoes(unraisable: Any) -> None:
  """Suppresses Python's report of an `Interrupted` that was raised in a finaliser: it is raised again afterwards.

  See `immediate_signals`.
  """
  from bbqrec_jax.utils.signals import Interrupted

  if not isinstance(unraisable.exc_value, Interrupted):
    sys.__unraisablehook__(unraisable)


class _SeveralParser(tuple_parser.TupleParser):
  """The values of a config field that holds several: `text,image` as well as `('text', 'image')`; nothing is none."""

  syntactic_help = "names or numbers, separated by commas"

  def parse(self, argument: Any) -> tuple[Any, ...]:
    """The values; what are no Python literals are names, with or without quotes and brackets."""
    if not isinstance(argument, str):
      return super().parse(argument)
    try:
      value = ast.literal_eval(argument.strip())
    except (ValueError, SyntaxError):
      inner = re.sub(r"^\s*(?:\((.*)\)|\[(.*)\])\s*$", r"\1\2", argument)
      value = [word for word in (part.strip().strip("'\"") for part in inner.split(",")) if word]
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(one, str | int | float) for one in values):
      raise ValueError(f"expected {self.syntactic_help}")
    return values


config_flags.register_flag_parser_for_type(tuple, _SeveralParser())


def start(
  main: Callable[[list[str]], None],
  *,
  flags_parser: Callable[[list[str]], list[str]] | None = None,
  prints: bool = True,
) -> None:
  """Runs a program: its flags, then `main`, whatever its standard streams are (see `lasting_streams`).

  `--help` shows what the module of `main` says of itself, and its flags. Nothing that takes long to import, such as
  JAX, needs to have been imported for that.

  Args:
    main: is given the command line without its flags.
    flags_parser: parses them; `parse_flags` if it is None.
    prints: whether what it prints is what it is for; otherwise its files are.
  """

  def parse(argv: list[str]) -> list[str]:
    if {"--help", "-h"} & set(argv[1:]):
      name = argv[0] if main.__module__ == "__main__" else main.__module__
      print(f"{(sys.modules[main.__module__].__doc__ or '').strip()}\n{flags.FLAGS.module_help(name)}")
      sys.exit(0)
    return (flags_parser or parse_flags)(argv)

  with lasting_streams(needed=prints):
    app.run(main, flags_parser=parse)


def quiet_flags() -> Any:
  """The flags of a program that does not train: it logs no more than warnings."""
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  return flags.FLAGS


def ready_to_train() -> None:
  """What a program that trains does before anything else: settles JAX's options, keeps memory and what is compiled."""
  from bbqrec_jax.utils.compilation import keep_compiled
  from bbqrec_jax.utils.environment import settle_jax
  from bbqrec_jax.utils.host_memory import keep_memory

  keep_memory()
  settle_jax()
  keep_compiled()


def show(answer: Callable[[], str]) -> None:
  """Prints what a program computes from finished runs; a wrong input ends it with one line."""
  from bbqrec_jax.utils.compilation import keep_compiled
  from bbqrec_jax.utils.environment import settle_jax

  settle_jax()
  keep_compiled()
  try:
    print(answer())
  except InputError as error:
    refuse(error)


@contextlib.contextmanager
def training(workdir: pathlib.Path) -> Iterator[None]:
  """For programs that train: an interruption, a full disk or a wrong input ends them with one line.

  The exit status is 0 after SIGTERM, 130 after Ctrl-C, 2 for wrong input and 1 for anything else that went wrong.

  Args:
    workdir: where the program writes.
  """
  from bbqrec_jax.utils import processes
  from bbqrec_jax.utils.signals import Interrupted, exit_on_second_interrupt, immediate_signals

  if not flags.FLAGS["verbosity"].present:
    # orbax tells of every file it writes; what fails there it also raises.
    logging.set_verbosity(logging.FATAL)
  sys.unraisablehook = _drop_echoes
  try:
    with exit_on_second_interrupt(), immediate_signals(), processes.ended_together():
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
  """For programs that do not train: a place that cannot be written to ends them with one line and status 1.

  An output that was given as a URL is sent there at the end.
  """
  try:
    yield
    if is_url(as_given(str(output))):
      from bbqrec_jax.utils.remote import deliver

      deliver(output)
  except OSError as error:
    refuse(StorageError(f"{output} could not be written: {error.strerror}"), status=1)
  except StorageError as error:
    refuse(error, status=1)


def define_path(name: str, help_text: str, *, check: Callable[..., None] | None = None, use: Use = "folders") -> None:
  """Defines a flag whose value is a path; "~" is the home folder, as shells leave it alone after "=".

  Args:
    name: of the flag.
    help_text: of the flag.
    check: called with the path and flag=name; refuses, with an `InputError`, what the program could not use.
    use: what a URL is for, see `local_path`.
  """
  flags.DEFINE(_PathParser(name, check, use), name, None, help_text, serializer=flags.ArgumentSerializer())


def define_settings(settings: Any) -> None:
  """Defines a flag for each field of settings, called like it, with its sentence.

  Args:
    settings: with their defaults, of a class whose fields are declared by `utils.settings.setting`.
  """
  from bbqrec_jax.utils.settings import describe

  for name, _, allowed, sentence in describe(settings):
    value = getattr(settings, name)
    shown = "" if value in ("", ()) else f" Default: {value}."
    help_text = f"{sentence} ({allowed})" if allowed and isinstance(value, str) else sentence
    if isinstance(value, bool):
      flags.DEFINE_bool(name, None, help_text + shown)
    elif isinstance(value, int):
      flags.DEFINE_integer(name, None, help_text + shown)
    elif isinstance(value, float):
      flags.DEFINE_float(name, None, help_text + ("" if abs(value) == float("inf") else shown))
    elif isinstance(value, tuple):
      flags.DEFINE_list(name, None, help_text + shown)
    else:
      flags.DEFINE_string(name, None, help_text + shown)


def given_settings(kind: Any) -> dict[str, Any]:
  """The fields of settings that flags of `define_settings` were given for, by name."""
  values = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(kind)}
  given = {name: value for name, value in values.items() if value is not None}
  return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def define_run_flags() -> None:
  """Defines the flags of a program that restores a finished run."""
  define_path("workdir", "The workdir of a finished run.", use="read")
  define_path("data", "The folder of the run's data, where that has moved since.", use="read")
  flags.DEFINE_list("trust", [], "Python modules of yours that the run's config may name its parts from.")
  flags.mark_flag_as_required("workdir")


class _PathParser(flags.ArgumentParser):
  """Paths that this machine can have, as `local_path` knows them."""

  syntactic_help = "a path"

  def __init__(self, name: str, check: Callable[..., None] | None, use: Use):
    """See `define_path`."""
    self._name, self._check, self._use = name, check, use

  def parse(self, argument: Any) -> pathlib.Path:
    """The path with its "~" expanded."""
    path = local_path(argument, flag=self._name, use=self._use)
    if self._check is not None:
      self._check(path, flag=self._name)
    return path


def parse_flags(argv: list[str], *, known: Collection[str] = (), words: bool = False) -> list[str]:
  """Parses a program's flags; what is wrong with them, or with the config that they name, ends it with one line.

  Args:
    argv: the command line.
    known: the fields that `--config.field=value` may set; none named leaves that to the config.
    words: whether words may stand beside the flags.

  Returns:
    The name of the program, and the words beside its flags.
  """
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")  # Paths and titles may hold what the terminal's encoding lacks.
  for argument in argv[1:] if known else ():
    field = re.match(r"--?config\.([^=]+)", argument)
    if field and field[1] not in known:
      close = difflib.get_close_matches(field[1], known, 1)
      meant = f"did you mean {close[0]}? " if close else ""
      refuse(InputError(f"config field {field[1]} is unknown: {meant}--help-config lists the fields"))
  argv = [re.sub("^(--?config=)(?=~)(.*)", _with_home, word, flags=re.DOTALL) for word in argv]
  given = _given_config(argv) if "config" in flags.FLAGS else ""
  try:
    if _is_preset(given):
      argv = _with_presets_file(argv, given)
    elif given:
      file, _, choice = str(local_path(given.rstrip(":"), flag="config")).partition(":")
      where = " before the first ':', which begins its choice" if "/" in choice else ""
      check_file(pathlib.Path(file), what=f"a config file{where}")
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
  if len(rest) > 1 and not words:
    refuse(InputError(f"unexpected argument {rest[1]!r}: every argument is a flag, --name=value; --help lists them"))
  return rest


def _with_home(found: re.Match[str]) -> str:
  return found[1] + os.path.expanduser(found[2])


def _is_preset(given: str) -> bool:
  """Whether a config is given by the name of a preset, and not as a file.

  Raises:
    InputError: if it could be nothing else, and there is none of that name.
  """
  from bbqrec_jax.presets import PRESETS

  if not re.fullmatch(r"\w+", given) or given in PRESETS or os.path.exists(given):
    return given in PRESETS
  close = difflib.get_close_matches(given, PRESETS, 1)
  meant = f"did you mean {close[0]}? " if close else ""
  raise InputError(
    f"--config={given}: expected a config file or a preset, found neither; {meant}the presets are {', '.join(PRESETS)}"
  )


def _with_presets_file(argv: list[str], name: str) -> list[str]:
  """The command line with a preset as the choice of a config file, which ml_collections can read."""
  from bbqrec_jax import presets

  placed = f"{presets.__file__}:{name}"
  pairs = itertools.pairwise(["", *argv])
  return [
    placed if before.strip("-") == "config" else re.sub(f"^(--?config=){name}$", lambda f: f[1] + placed, word)
    for before, word in pairs
  ]


def _given_config(argv: list[str]) -> str:
  """What `--config` names, FILE or FILE:CHOICE; "" where it is not there."""
  for word, following in itertools.pairwise([*argv, ""]):
    found = re.fullmatch(r"--?config(?:=(.*))?", word, re.DOTALL)
    if found:
      return following if found[1] is None else found[1]
  return ""


def _of_flag(error: flags.Error) -> str:
  """What is wrong with a flag."""
  if isinstance(error.__context__, InputError):
    return str(error.__context__)
  text = re.sub(r"flag (--\w+)=None: Flag --\w+ must have a value other than None\.", r"\1 is needed", str(error))
  given = re.match(r"flag (--([^=]+)=.*?): ", text, re.DOTALL)
  if given:
    parser = flags.FLAGS[given[2]].parser
    kind = "true or false" if parser.flag_type() == "bool" else parser.syntactic_help
    text = f"{given[1]}: expected {kind}" if kind else text
  where = "--help-config lists the fields" if "--config." in text else "--help lists the flags"
  return "; ".join([*text.rstrip(".? ").splitlines(), where])


def _of_config(error: BaseException, given: str) -> str:
  """What is wrong with the config file that `--config` names, or with a field that is set on the command line."""
  while error.__context__ and (isinstance(error, flags.Error) or "whilst parsing config file" in str(error)):
    error = error.__context__  # What absl and ml_collections made an error of.
  file, _, choice = given.partition(":")
  told = re.sub(r"""["']?(Key .*?)\. Other fields present.*""", r"\1", str(error), flags=re.DOTALL)
  if isinstance(error, InputError):
    return f"--config={given}: {told}"
  if choice and re.match(r"\w+\(\) takes 0 positional arguments", told):
    return f"--config={given}: {file} offers no choices, got {choice!r}; give --config={file}"
  if isinstance(error, KeyError | AttributeError) and " " not in told:
    name = told.strip("\\\"'")
    return f"--config={given}: {name!r} is neither a field nor a choice that the file offers"
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(file)]
  where = f" (line {lines[-1]})" if file and lines else ""
  return f"--config={given} cannot be used: {type(error).__name__}: {told}{where}"
