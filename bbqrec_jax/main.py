"""Runs a config: `python -m bbqrec_jax.main --config=configs/quickstart.py --workdir=runs/quickstart`."""

import functools
import pathlib
import signal
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from bbqrec_jax.command_line import parse_flags
from bbqrec_jax.compilation import keep_compiled
from bbqrec_jax.config import default_config, flatten
from bbqrec_jax.errors import InputError, refuse
from bbqrec_jax.experiment import run
from bbqrec_jax.train.loop import Interrupted


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
  app.run(main, flags_parser=functools.partial(parse_flags, known=flatten(default_config())))
