"""Lists runs: how far each is, what it reached, and in which settings they differ.

    bbqrec runs runs
    bbqrec runs runs/a runs/b --sort="test ndcg@10" --json

A folder is a workdir, or is looked into for workdirs. `bbqrec compare` puts finished ones beside one another with
differences user by user.
"""

import functools
import json

from absl import flags

from bbqrec_jax.command_line import parse_flags, quiet_flags, start
from bbqrec_jax.errors import InputError, printable, refuse
from bbqrec_jax.utils.files import local_path

SORTS = ("", "validation recall@10", "validation ndcg@10", "test recall@10", "test ndcg@10", "minutes")


def main(argv: list[str]) -> None:
  """Prints the table."""
  from bbqrec_jax.runs.listing import find_workdirs, read_run, sort_runs, to_rows, to_table

  options = quiet_flags()
  try:
    if len(argv) < 2:
      raise InputError("expected folders with runs: bbqrec runs runs")
    workdirs = find_workdirs([local_path(word, flag="workdir") for word in argv[1:]])
    runs = sort_runs([read_run(workdir) for workdir in workdirs], options.sort)
  except InputError as error:
    refuse(error)
  if options.json:
    print(json.dumps(to_rows(runs), indent=2))
  else:
    print("\n".join(map(printable, to_table(runs).splitlines())))


def program() -> None:
  """Defines the flags and runs the program."""
  flags.DEFINE_enum("sort", "", SORTS, "The figure that they are sorted by, the best first.")
  flags.DEFINE_bool("json", False, "Print JSON in place of a table.")
  start(main, flags_parser=functools.partial(parse_flags, words=True))
