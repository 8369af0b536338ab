"""A launch as a plan, that is a list of commands: how it is printed and run, and the program that it starts."""

import argparse
import dataclasses
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.files import local_path

_ROOT = pathlib.Path(__file__).resolve().parents[2]
IN_CHECKOUT = (_ROOT / "setup.cfg").is_file()
# Where commands are run, and where this folder is from there: hosts get copies of a checkout.
ROOT = _ROOT if IN_CHECKOUT else pathlib.Path.cwd()
ON_HOSTS = "bbqrec_jax/launch"
FOLDER = ON_HOSTS if IN_CHECKOUT else str(pathlib.Path(__file__).resolve().parent)
# Where hosts that are made for the run have the bucket or claim; tpu_worker.sh has it too.
MOUNT = "/mnt/bbqrec"
EXAMPLE = "-- --config=configs/beauty.py --workdir=FOLDER"
_TOOLS = {
  "docker": "install Docker, or build the image elsewhere and leave `build` out",
  "gcloud": "install the Google Cloud CLI",
  "kubectl": "install it and connect it to the cluster",
  "sbatch": "start this on a login node of the cluster",
}


class Parser(argparse.ArgumentParser):
  """Says what is wrong with a command line in one line."""

  def error(self, message: str) -> NoReturn:
    """Raises what `bbqrec_jax.errors.refuse` shows."""
    raise InputError(f"{self.prog}: {message}; --help shows every flag")


def positive(text: str) -> int:
  """A number of things, from a flag."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"expected a number from 1 on, got {text}")
  return int(text)


def name(text: str) -> str:
  """What Google Cloud, Slurm and Kubernetes all accept as a name, from a flag."""
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", text):
    raise argparse.ArgumentTypeError(f"expected at most 40 of a-z, 0-9 and -, a letter first, got {text}")
  return text


@dataclasses.dataclass(frozen=True)
class Step:
  """One command of a plan.

  Attributes:
    argv: the program and its arguments; it is run in the root of the checkout, or the current folder without one.
    stdin: what it reads.
    asks: what it does that must be agreed to first; empty where it neither costs nor deletes anything.
  """

  argv: tuple[str, ...]
  stdin: str = ""
  asks: str = ""

  def __str__(self) -> str:
    command = shlex.join(self.argv)
    return f"{command} <<'END'\n{self.stdin}\nEND" if self.stdin else command


class Program(NamedTuple):
  """What every host runs.

  Attributes:
    arguments: of Python.
    workdir: that the flags name, a "~" expanded: the scripts look into it.
    data: where the flags say that the data lies, None where they do not.
  """

  arguments: tuple[str, ...]
  workdir: str
  data: str | None


def read_program(flags: Sequence[str]) -> Program:
  """The program with the flags that stand after `--`.

  Raises:
    InputError: if the config or the workdir is missing, or one of them or the data's folder is no path of a host.
  """
  parser = Parser(prog="the program's flags", allow_abbrev=False, add_help=False)
  for flag in ("config", "workdir", "data", "config.data.path"):
    parser.add_argument(f"--{flag}", f"-{flag}", dest=flag)
  known = vars(parser.parse_known_args(flags)[0])
  for flag in ("config", "workdir"):
    if not known[flag]:
      raise InputError(f"--{flag} is missing: give the program's flags after --, as {EXAMPLE}")
  paths = {flag: str(local_path(path, flag=flag)) for flag, path in known.items() if path}
  arguments = ("-m", "bbqrec_jax.main", "--distributed=on", *flags)
  return Program(arguments, paths["workdir"], paths.get("data", paths.get("config.data.path")))


def require_mount(program: Program) -> None:
  """Refuses a workdir or data that lie on the own disk of a host that is made for the run.

  Raises:
    InputError: if either is not below the mount point.
  """
  for flag, value in (("--workdir", program.workdir), ("--config.data.path", program.data or MOUNT)):
    path = pathlib.PurePosixPath(value)
    if not path.is_relative_to(MOUNT) or ".." in path.parts:
      raise InputError(
        f"{flag}={value}: expected a folder below {MOUNT}, where every host has the bucket or claim; anything"
        " else is a host's own disk, which the other hosts do not see and which is lost with the host"
      )


def require_checkout(action: str) -> None:
  """Refuses what copies the checkout where the package was installed without one.

  Raises:
    InputError: if that is so.
  """
  if not IN_CHECKOUT:
    raise InputError(f"`{action}` copies a checkout of the project to the hosts: run it from one, installed with -e")


def check_bucket(bucket: str | None) -> list[Step]:
  """The command that refuses a bucket which cannot take a checkpoint in one piece; none if there is no bucket."""
  return [Step(("bash", f"{FOLDER}/check.sh", "bucket", bucket))] if bucket else []


def of_actions(actions: Sequence[str], makers: Sequence[Callable[[], list[Step]]]) -> list[Step]:
  """The steps of all actions, in their order.

  Args:
    actions: names of makers.
    makers: a function an action, which makes its steps.

  Raises:
    InputError: if there is no such action.
  """
  known = {maker.__name__: maker for maker in makers}
  for action in actions:
    if action not in known:
      raise InputError(f"action {action} is unknown: choose from {', '.join(known)}")
  return [step for action in actions for step in known[action]()]


def format_plan(steps: Sequence[Step]) -> str:
  """The plan as a shell script; what would be asked first stands before its command as a comment."""
  lines = [
    "#!/usr/bin/env bash",
    "# What stands in single quotes is meant for the shells of the hosts.",
    "# shellcheck disable=SC2016",
    "set -euo pipefail",
    shlex.join(["cd", str(ROOT)]),
  ]
  for step in steps:
    lines += [f"# asks first: {step.asks}"] if step.asks else []
    lines.append(str(step))
  return "\n".join(lines)


def execute(steps: Sequence[Step], *, agreed: bool) -> None:
  """Asks, then runs a plan; ends the program with status 1 if that is declined or a command fails.

  Args:
    steps: the plan.
    agreed: whether everything that it asks is agreed to already.

  Raises:
    InputError: if a program is missing, or there is no terminal to ask on.
  """
  for step in steps:
    if shutil.which(step.argv[0]) is None:
      raise InputError(f"{step.argv[0]} is not on PATH: {_TOOLS.get(step.argv[0], 'install it')}")
  for step in steps:
    if not step.asks or agreed:
      continue
    if not sys.stdin.isatty():
      raise InputError(f"this would {step.asks}: there is no terminal to ask on, give --yes to agree")
    if input(f"This will {step.asks}. Go on? [y/N] ").strip().lower() not in ("y", "yes"):
      sys.exit("nothing was run")
  for step in steps:
    print(f"+ {shlex.join(step.argv)}", flush=True)
    status = subprocess.run(step.argv, cwd=ROOT, input=step.stdin or None, text=True, check=False).returncode
    if status:
      sys.exit(f"error: status {status} of {shlex.join(step.argv)}: what was to follow it was not run")
