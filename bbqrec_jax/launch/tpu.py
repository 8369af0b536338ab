"""TPU VMs: one slice, a queued resource for the run; each worker installs the project and runs the program."""

import argparse
import shlex
from collections.abc import Sequence

from bbqrec_jax.errors import InputError
from bbqrec_jax.launch.plan import (
  FOLDER,
  MOUNT,
  ON_HOSTS,
  Step,
  check_bucket,
  name,
  of_actions,
  read_program,
  require_checkout,
  require_mount,
)

# What a worker needs of the checkout.
_FILES = ("LICENSE", "README.md", "bbqrec_jax", "configs", "experiments", "pyproject.toml", "setup.cfg")
_ARCHIVE = "bbqrec_jax.tar.gz"


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of `plan`."""
  parser.add_argument("actions", nargs="+", help="of create, install, run, logs, stop, delete, resume; in this order")
  parser.add_argument("--name", type=name, required=True, help="of the queued resource, and of its TPU")
  parser.add_argument("--zone", required=True)
  parser.add_argument("--project", help="gcloud's own if not given")
  parser.add_argument("--accelerator-type", help="as v5litepod-16")
  parser.add_argument("--runtime-version", help="as v2-alpha-tpuv5-lite")
  parser.add_argument("--spot", action="store_true", help="cheaper, and taken away at any time")
  parser.add_argument("--bucket", help=f"a bucket with hierarchical namespace, to be mounted at {MOUNT}")
  parser.add_argument("--create-flag", action="append", default=[], metavar="FLAG", help="any other of gcloud's create")


def plan(args: argparse.Namespace, flags: Sequence[str]) -> list[Step]:
  """The commands for the actions asked for.

  Args:
    args: of `add_flags`.
    flags: of the program.

  Raises:
    InputError: if an action lacks a flag, or what it is to do would not work.
  """
  where = [f"--zone={args.zone}", *([f"--project={args.project}"] if args.project else [])]
  tpus = ("gcloud", "compute", "tpus")
  resource = (*tpus, "queued-resources")
  worker = f"bash bbqrec_jax/{ON_HOSTS}/tpu_worker.sh"
  shown = f"the TPU {args.name} in {args.zone}"

  def on_workers(command: str, which: str = "all") -> Step:
    return Step((*tpus, "tpu-vm", "ssh", args.name, *where, f"--worker={which}", f"--command={command}"))

  def create() -> list[Step]:
    if not (args.accelerator_type and args.runtime_version):
      raise InputError(
        "`create` needs --accelerator-type and --runtime-version, as v5litepod-16 and v2-alpha-tpuv5-lite"
      )
    options = [f"--accelerator-type={args.accelerator_type}", f"--runtime-version={args.runtime_version}"]
    options += [f"--node-id={args.name}", *(["--spot"] if args.spot else []), *args.create_flag]
    asks = f"create {shown} ({args.accelerator_type}), which costs money until it is deleted"
    created = Step((*resource, "create", args.name, *where, *options), asks=asks)
    return [created, Step(("bash", f"{FOLDER}/check.sh", "active", args.name, *where))]

  def install() -> list[Step]:
    require_checkout("install")
    if not args.bucket:
      raise InputError(f"`install` needs --bucket, which it mounts at {MOUNT}")
    return [
      *check_bucket(args.bucket),
      Step(("mkdir", "-p", "dist")),
      Step(("tar", "--create", "--gzip", f"--file=dist/{_ARCHIVE}", "--exclude=__pycache__", *_FILES)),
      Step((*tpus, "tpu-vm", "scp", f"dist/{_ARCHIVE}", f"{args.name}:", *where, "--worker=all")),
      on_workers(
        f"mkdir -p bbqrec_jax && tar --extract --gzip --file={_ARCHIVE} --directory=bbqrec_jax"
        f" && {worker} install {shlex.quote(args.bucket)}"
      ),
    ]

  def run() -> list[Step]:
    program = read_program(flags)
    require_mount(program)
    return [on_workers(f"{worker} start {shlex.join(program.arguments)}")]

  def logs() -> list[Step]:
    return [on_workers("sudo journalctl --unit=bbqrec --output=cat --lines=1000 --follow", which="0")]

  def stop() -> list[Step]:
    return [on_workers("sudo systemctl stop bbqrec")]

  def delete() -> list[Step]:
    return [Step((*resource, "delete", args.name, *where, "--quiet", "--force"), asks=f"delete {shown}")]

  def resume() -> list[Step]:
    return [*delete(), *create(), *install(), *run()]

  return of_actions(args.actions, [create, install, run, logs, stop, delete, resume])
