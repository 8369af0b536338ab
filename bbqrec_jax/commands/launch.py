"""Launches a run on TPU VMs, on a Slurm cluster or on Kubernetes; docs/launch.md shows each.

    bbqrec launch tpu create install run --name=NAME ... -- --config=FILE --workdir=FOLDER
    bbqrec launch slurm --nodes=2 --gpus-per-node=4 -- --config=FILE --workdir=FOLDER
    bbqrec launch jobset build apply --name=NAME ... -- --config=FILE --workdir=FOLDER

What stands after `--` are the flags of `bbqrec train`, which every host gets; `--distributed=on` is added.

A launch is a plan, a list of commands made before any of them is run. `--dry-run` prints it, as a shell script, and
runs nothing. Otherwise what costs money or deletes something is asked first, all at once, unless `--yes` is given, and
the commands run one after another until one fails.
"""

import argparse
import sys
from collections.abc import Sequence

from bbqrec_jax.errors import InputError, refuse
from bbqrec_jax.launch import jobset, slurm, tpu
from bbqrec_jax.launch.plan import EXAMPLE, Parser, execute, format_plan
from bbqrec_jax.utils.standard_streams import lasting_streams


def make_parser() -> Parser:
  """The launcher's own flags, those before `--`."""
  common = Parser(add_help=False)
  common.add_argument("--dry-run", action="store_true", help="print every command, run none")
  common.add_argument("--yes", action="store_true", help="agree to everything that would be asked")
  parser = Parser(
    prog="launch",
    allow_abbrev=False,
    usage=f"bbqrec launch {{tpu,slurm,jobset}} [flags] {EXAMPLE}",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  kinds = parser.add_subparsers(required=True, prog="launch", metavar="{tpu,slurm,jobset}")
  for module in (tpu, slurm, jobset):
    about = (module.__doc__ or "").strip()
    made = kinds.add_parser(
      module.__name__.rpartition(".")[2], parents=[common], allow_abbrev=False, description=about, help=about
    )
    made.epilog = "What stands after -- are the flags of bbqrec train."
    made.set_defaults(plan=module.plan)
    module.add_flags(made)
  return parser


def main(argv: Sequence[str]) -> None:
  """Prints or runs the plan of a command line."""
  split = argv.index("--") if "--" in argv else len(argv)
  try:
    args = make_parser().parse_args(argv[:split])
    steps = args.plan(args, argv[split + 1 :])
    if args.dry_run:
      print(format_plan(steps))
    else:
      execute(steps, agreed=args.yes)
  except InputError as error:
    refuse(error)
  except KeyboardInterrupt:
    sys.exit(130)


def program() -> None:
  """Runs the program."""
  with lasting_streams():
    main(sys.argv[1:])
