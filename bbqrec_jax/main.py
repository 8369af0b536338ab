"""Runs a config: `python -m bbqrec_jax.main --config=configs/quickstart.py --workdir=runs/quickstart`."""

import functools
import pathlib

import jax
from absl import app, flags
from ml_collections import config_flags

from bbqrec_jax.command_line import parse_flags, training
from bbqrec_jax.compilation import keep_compiled
from bbqrec_jax.config import default_config, flatten
from bbqrec_jax.experiment import run


def main(argv: list[str]) -> None:
  """Runs the flags' config."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  keep_compiled()
  workdir = pathlib.Path(flags.FLAGS.workdir)
  with training(workdir):
    run(flags.FLAGS.config, workdir)


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "The config file; --config.field=value sets a field.")
  flags.DEFINE_string("workdir", None, "Where everything is written; the same one again goes on with the run.")
  flags.mark_flags_as_required(["config", "workdir"])
  jax.config.config_with_absl()
  app.run(main, flags_parser=functools.partial(parse_flags, known=flatten(default_config())))
