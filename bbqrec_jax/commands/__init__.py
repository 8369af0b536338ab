"""The commands, each a thin layer of flags and messages; `bbqrec NAME` starts one."""

import difflib
import importlib
import sys

import bbqrec_jax
from bbqrec_jax.errors import InputError, refuse

COMMANDS = {
  "prepare": "logs, a product table and pictures become a data set",
  "features": "features of a data set's items, from their texts, pictures and attributes",
  "train": "train the tokenizer and the recommender of a config, or continue",
  "recommend": "the best next items of a user, a history, or a file of them",
  "assign": "semantic IDs for items that came after training",
  "export": "a finished run as a bundle, all that a server needs",
  "serve": "answer over HTTP from a bundle, with a page to try it",
  "report": "what a run learned and reached, as one page",
  "runs": "list runs: how far they are, what they reached, how they differ",
  "track": "tell Weights & Biases or MLflow of a run",
  "grid": "train systems on data sets with several seeds, and compare them",
  "compare": "compare finished runs, user by user",
  "benchmark": "time everything on whatever JAX sees",
  "launch": "start a run on TPU VMs, Slurm or Kubernetes",
}

_HELP = """Multi-modal sequential recommendation with semantic IDs.

    bbqrec train --config=quickstart --workdir=runs/quickstart
    bbqrec recommend --workdir=runs/quickstart --history=3,17,256

{commands}

bbqrec COMMAND --help explains each."""


def call(command: str, arguments: list[str]) -> None:
  """Runs a command.

  Args:
    command: of COMMANDS.
    arguments: its flags.
  """
  sys.argv = [f"bbqrec {command}", *arguments]  # Where ml_collections looks for the fields of a config, too.
  importlib.import_module(f"bbqrec_jax.commands.{command}").program()


def main() -> None:
  """Runs the command that the first word of the command line names."""
  command, *arguments = sys.argv[1:] or ["--help"]
  if command in ("-h", "-help", "--help", "help"):
    width = max(map(len, COMMANDS))
    print(_HELP.format(commands="\n".join(f"  {name:{width}s}  {what}" for name, what in COMMANDS.items())))
  elif command == "--version":
    print(f"bbqrec_jax {bbqrec_jax.__version__}")
  elif command in COMMANDS:
    call(command, arguments)
  else:
    close = difflib.get_close_matches(command, COMMANDS, 1)
    meant = f"did you mean {close[0]}? " if close else ""
    refuse(InputError(f"bbqrec has no command {command!r}: {meant}there are {', '.join(COMMANDS)}"))
