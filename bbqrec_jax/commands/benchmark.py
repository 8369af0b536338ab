"""Times everything on whatever JAX sees.

    bbqrec benchmark --config=benchmark --output=small.json
    bbqrec benchmark --records=DIR

prints a table, and writes it as `small.json`. `--only=tokenizer,causal/dense` chooses by the beginning of the names;
`--config=benchmark_paper` and `benchmark_large` are larger. `--records` prints one table of all such files in a folder,
for each config.

The JSON holds `schema` (1), `about` (versions, device kind and count, of a CPU its model, cores, load, commit),
`limits` (the rates of a large product and of a copy that were measured in the same process, on one device), `peak` (the
data sheet's, of all devices; null where it is not known) and `records`, see `benchmarks.timing.measure` and
`benchmarks.report.utilisation`.
"""

from typing import Any

from absl import flags
from ml_collections import config_flags

from bbqrec_jax.command_line import define_path, quiet_flags, start, writing
from bbqrec_jax.errors import InputError, refuse
from bbqrec_jax.utils.files import check_output


def main(argv: list[str]) -> None:
  """Times, or shows what was timed before."""
  del argv
  from bbqrec_jax.benchmarks.report import table
  from bbqrec_jax.benchmarks.run import records, run
  from bbqrec_jax.utils.environment import settle_jax
  from bbqrec_jax.utils.host_memory import keep_memory
  from bbqrec_jax.utils.json_files import write_json

  options = quiet_flags()
  keep_memory()
  settle_jax()
  try:
    if options.records:
      print(records(options.records))
      return
    if options.config is None or "run" not in options.config:
      raise InputError(
        "--config: expected benchmark, benchmark_paper or benchmark_large, or a file like them, which holds what is"
        " timed beside the config of a run; or give --records with a folder"
      )
    output = options.output

    def keep(result: dict[str, Any]) -> None:
      if output:
        with writing(output):
          write_json(output, result)

    result = run(options.config, only=tuple(options.only), keep=keep)
  except InputError as error:
    refuse(error)
  print(table(result))


def program() -> None:
  """Defines the flags and runs the program."""
  config_flags.DEFINE_config_file("config", None, "benchmark, benchmark_paper, benchmark_large, or a file like them.")
  define_path("output", "The JSON file.", check=check_output)
  flags.DEFINE_list("only", [], "Beginnings of the names of what to time.")
  define_path("records", "A folder of such files, to print one table of instead.")
  start(main)
