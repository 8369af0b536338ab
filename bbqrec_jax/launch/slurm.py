"""Slurm: a job of one task per GPU, as JAX expects there, requeued until the run is done."""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from bbqrec_jax.errors import InputError
from bbqrec_jax.launch.plan import FOLDER, ROOT, Step, name, positive, read_program

# Of file systems that one machine has to itself, the usual ones.
_LOCAL = ("btrfs", "ext2", "ext3", "ext4", "overlay", "tmpfs", "xfs", "zfs")


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of `plan`."""
  parser.add_argument("--name", type=name, default="bbqrec", help="of the job")
  parser.add_argument("--nodes", type=positive, required=True)
  parser.add_argument("--gpus-per-node", type=positive, required=True)
  parser.add_argument("--python", default=sys.executable, help="on the nodes; the one that runs this if not given")
  parser.add_argument("--sbatch", action="append", default=[], metavar="FLAG", help="any other flag of sbatch")


def check_shared(workdir: pathlib.Path, mounts: str) -> str:
  """What to warn of a workdir that several nodes shall write to, judged where the job is submitted; empty if nothing.

  Args:
    workdir: absolute.
    mounts: in the format of `/proc/mounts`.

  Raises:
    InputError: if it is certain that each node has a folder of its own there.
  """
  for folder in ("/tmp", "/var/tmp", "/dev/shm"):
    if workdir.is_relative_to(folder):
      raise InputError(f"--workdir={workdir}: every node has a {folder} of its own; name a folder on shared storage")
  rows = [line.split() for line in mounts.splitlines()]
  kinds = {folder: kind for _, folder, kind, *_ in rows if workdir.is_relative_to(folder)}
  kind = kinds[max(kinds, key=len)] if kinds else ""
  return f"--workdir={workdir} is on {kind} here: make sure that every node sees it" if kind in _LOCAL else ""


def plan(args: argparse.Namespace, flags: Sequence[str]) -> list[Step]:
  """The commands that submit the job.

  Args:
    args: of `add_flags`.
    flags: of the program.

  Raises:
    InputError: if the nodes cannot share the workdir.
  """
  program = read_program(flags)
  if args.nodes > 1:
    mounts = pathlib.Path("/proc/mounts")
    warning = check_shared(ROOT / program.workdir, mounts.read_text() if mounts.exists() else "")
    if warning:
      print(f"warning: {warning}", file=sys.stderr)
  submit = (
    "sbatch", f"--job-name={args.name}", f"--nodes={args.nodes}", f"--ntasks-per-node={args.gpus_per_node}",
    f"--gpus-per-node={args.gpus_per_node}", "--requeue", "--signal=TERM@180", "--open-mode=append",
    "--output=runs/%x-%j.log", *args.sbatch, f"{FOLDER}/slurm_job.sh", program.workdir, args.python,
    *program.arguments,
  )  # fmt: skip
  asks = f"submit a job of {args.nodes} nodes with {args.gpus_per_node} GPUs each"
  return [Step(("mkdir", "-p", "runs")), Step(submit, asks=asks)]
