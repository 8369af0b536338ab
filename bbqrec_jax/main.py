"""Runs a config: `python -m bbqrec_jax.main --config=configs/quickstart.py --workdir=runs/quickstart`."""

import difflib
import pathlib
import re
import signal
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from bbqrec_jax.compilation import keep_compiled
from bbqrec_jax.config import default_config, flatten
from bbqrec_jax.errors import InputError, refuse
from bbqrec_jax.experiment import run
from bbqrec_jax.train.loop import Interrupted


def parse_flags(argv: list[str]) -> list[str]:
  """Parses as absl does, with one line instead of a traceback where a config or a field of it is wrong."""
  known = flatten(default_config())
  for argument in argv[1:]:
    field = re.match(r"--?config\.([^=]+)", argument)
    if field and field[1] not in known:
      close = difflib.get_close_matches(field[1], known, 1)
      meant = f"did you mean {close[0]}? " if close else ""
      refuse(InputError(f"config field {field[1]} is unknown: {meant}all fields are in bbqrec_jax/config.py"))
  try:
    rest = app.parse_flags_with_usage(argv)
    flags.FLAGS.config.items()  # A config file that cannot be loaded is only missed when it is used.
    return rest
  except (AttributeError, KeyError, TypeError, ImportError, OSError) as error:
    refuse(InputError(f"the config cannot be used: {error}"))


def main(argv: list[str]) -> None:
  """Runs the flags' config."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # orbax tells of every file it writes.
  keep_compiled()
  try:
    run(flags.FLAGS.config, pathlib.Path(flags.FLAGS.workdir))
  except InputError as error:
    refuse(error)
  except Interrupted as stop:
    print(f"stopped by {stop}, everything is saved; the same command goes on from here", flush=True)
    sys.exit(0 if stop.signum == signal.SIGTERM else 128 + stop.signum)


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "The config file; --config.field=value sets a field.")
  flags.DEFINE_string("workdir", None, "Where everything is written; the same one again goes on with the run.")
  flags.mark_flags_as_required(["config", "workdir"])
  jax.config.config_with_absl()
  app.run(main, flags_parser=parse_flags)
