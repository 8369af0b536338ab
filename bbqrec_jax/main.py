"""Runs a config: `python -m bbqrec_jax.main --config=configs/quickstart.py --workdir=runs/quickstart`."""

import pathlib
import signal
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from bbqrec_jax.errors import InputError
from bbqrec_jax.experiment import run
from bbqrec_jax.train.loop import Interrupted

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config file; --config.field=value sets a field.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where all is written; the same again goes on.", required=True)
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
  """Runs the flags' config."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # orbax tells of every file it writes.
  workdir = pathlib.Path(_WORKDIR.value)
  try:
    run(_CONFIG.value, workdir)
  except InputError as error:
    sys.exit(f"error: {error}")
  except Interrupted as stop:
    print(f"stopped by {stop}, everything is saved; the same command goes on from here", flush=True)
    sys.exit(0 if stop.signum == signal.SIGTERM else 128 + stop.signum)


if __name__ == "__main__":
  jax.config.config_with_absl()
  app.run(main)
