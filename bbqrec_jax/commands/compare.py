"""Compares finished runs: means over seeds, and differences user by user.

    bbqrec compare runs/sasrec runs/hybrid-0 runs/hybrid-1
    bbqrec compare runs/*/* --reference=sasrec --output=comparison

Runs whose configs differ in the seed alone are one system, called as its folder (or the one above, where the folder's
name is a number). Beside the means stands what each system has over the reference, the first one if none is named, in
test NDCG@10: user by user, the mean of the seeds, with the 95 % interval that the spread over users gives. `--output`
makes a folder of `comparison.md`, `comparison.tex` and `comparison.png`.
"""

import functools
import os
import pathlib

from absl import flags

from bbqrec_jax.command_line import define_path, parse_flags, quiet_flags, start, writing
from bbqrec_jax.errors import InputError, refuse
from bbqrec_jax.utils.files import check_new, local_path, unfinished


def main(argv: list[str]) -> None:
  """Prints the table, and writes it."""
  from bbqrec_jax.runs.compare import compare, figure, systems_of, to_latex, to_markdown

  options = quiet_flags()
  output = options.output
  try:
    if output is not None:
      check_new(output)
    # Checkpoints are not looked into.
    systems = systems_of([local_path(word, flag="workdir", use="read", without="checkpoints/") for word in argv[1:]])
    reference = options.reference or next(iter(systems))
    if reference not in systems:
      raise InputError(f"--reference: expected one of {', '.join(systems)}, got {reference!r}")
    data, rows = compare(systems, reference=reference)
    picture = None if output is None else figure(rows, reference=reference)
  except ModuleNotFoundError as error:
    refuse(InputError(f"{error}: --output needs matplotlib; pip install 'bbqrec_jax[report]'"))
  except InputError as error:
    refuse(error)
  text = to_markdown(data, rows, reference=reference)
  print(text)
  if output is None or picture is None:
    return
  with writing(output):
    partial = pathlib.Path(unfinished(output))
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "comparison.md").write_text(text + "\n", encoding="utf-8")
    (partial / "comparison.tex").write_text(to_latex(rows, reference=reference), encoding="utf-8")
    picture.savefig(partial / "comparison.png", dpi=120)
    os.rename(partial, output)


def program() -> None:
  """Defines the flags and runs the program."""
  define_path("output", "The folder that is made, of the table and a picture.", use="write")
  flags.DEFINE_string("reference", None, "The system that the others are compared with.")
  start(main, flags_parser=functools.partial(parse_flags, words=True))
