"""Runs a config: `python -m bbqrec_jax.main --config=configs/quickstart.py --workdir=runs/quickstart`."""

import functools

import jax
from absl import flags
from ml_collections import config_flags

from bbqrec_jax.command_line import define_path, parse_flags, start, training
from bbqrec_jax.config import default_config
from bbqrec_jax.runs.run import run
from bbqrec_jax.utils import processes
from bbqrec_jax.utils.compilation import keep_compiled
from bbqrec_jax.utils.environment import settle_jax
from bbqrec_jax.utils.host_memory import keep_memory
from bbqrec_jax.utils.settings import flatten


def main(argv: list[str]) -> None:
  """Runs the flags' config."""
  del argv
  keep_memory()
  settle_jax()
  keep_compiled()
  with training(flags.FLAGS.workdir):
    processes.join(
      flags.FLAGS.distributed,
      coordinator=flags.FLAGS.coordinator,
      num_processes=flags.FLAGS.num_processes,
      process_id=flags.FLAGS.process_id,
    )
    run(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "The config file; --config.field=value sets a field.")
  define_path("workdir", "Where everything is written; the same one again goes on with the run.")
  flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "Whether this is one process of several that train one model together: what JAX finds out (TPU pods, Slurm, Open"
    " MPI, Kubernetes) or the three flags that follow say; on: it must be so; off: it is not.",
  )
  flags.DEFINE_string("coordinator", None, "host:port of the first process, where JAX cannot find it out.")
  flags.DEFINE_integer("num_processes", None, "How many processes there are, likewise.")
  flags.DEFINE_integer("process_id", None, "Which of them this is, from 0, likewise.")
  flags.mark_flags_as_required(["config", "workdir"])
  jax.config.config_with_absl()
  start(main, flags_parser=functools.partial(parse_flags, known=flatten(default_config())), prints=False)
