"""Trains what a config describes, or continues a run that was stopped.

    bbqrec train --config=quickstart --workdir=runs/quickstart
    bbqrec train --config=hybrid --data=DIR --workdir=runs/mine --config.recommender.steps=500
    bbqrec train --config=hybrid --data=TODAY --init_from=runs/yesterday --workdir=runs/today
    bbqrec train --config=hybrid --data=gs://bucket/data --workdir=gs://bucket/runs/mine
    bbqrec train --help-config

`--config` is the name of a preset or a file with a `get_config`, as FILE or FILE:CHOICE. Any of its fields can be set
with `--config.field=value`; `--help-config` lists them all, each with its default, what it may be, and a sentence.
"""

import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

from bbqrec_jax.command_line import define_path, parse_flags, ready_to_train, start, training
from bbqrec_jax.errors import as_given


def format_fields(settings: Any) -> str:
  """Every field of settings: its name and default, what it may be, and what it is."""
  from bbqrec_jax.utils.settings import describe

  return "\n".join(
    f"{name} = {default}{f'  ({allowed})' if allowed else ''}\n    {sentence}"
    for name, default, allowed, sentence in describe(settings)
  )


def _parse(argv: list[str]) -> list[str]:
  import jax

  from bbqrec_jax.config import RunSettings, default_config
  from bbqrec_jax.utils.settings import flatten

  if {"--help-config", "--help_config"} & set(argv[1:]):
    print(format_fields(RunSettings()))
    sys.exit(0)
  jax.config.config_with_absl()
  return parse_flags(argv, known=flatten(default_config()))


def main(argv: list[str]) -> None:
  """Runs the flags' config."""
  del argv
  from bbqrec_jax.data.sources import recognise_source
  from bbqrec_jax.runs.run import run
  from bbqrec_jax.utils import processes

  options = flags.FLAGS
  ready_to_train()
  with training(options.workdir):
    if options.data is not None:
      options.config.data.source = recognise_source(options.data)
      options.config.data.path = as_given(str(options.data))
    processes.join(
      options.distributed,
      coordinator=options.coordinator,
      num_processes=options.num_processes,
      process_id=options.process_id,
    )
    if options.init_from is not None:
      options.config.init_from = as_given(str(options.init_from))
    run(options.config, options.workdir)


def program() -> None:
  """Defines the flags and runs the program."""
  config_flags.DEFINE_config_file("config", None, "A preset or a config file; --config.field=value sets a field.")
  define_path(
    "data",
    "The folder of the data, in the project's own format or in RecBole's: sets data.path and source.",
    use="read",
  )
  define_path("init_from", "The workdir of a finished run on earlier data, to begin with what it learned.", use="read")
  define_path(
    "workdir", "Where everything is written, a folder or a URL; the same one again goes on with it.", use="run"
  )
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
  start(main, flags_parser=_parse, prints=False)
