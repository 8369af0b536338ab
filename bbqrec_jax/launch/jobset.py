"""Kubernetes: a JobSet of one pod per host, restarted together when one fails; GKE (TPUs, GPUs) or others (GPUs)."""

import argparse
import json
import math
import pathlib
import re
import string
from collections.abc import Sequence
from typing import Any

from bbqrec_jax.errors import InputError
from bbqrec_jax.launch.plan import (
  FOLDER,
  MOUNT,
  ON_HOSTS,
  Step,
  check_bucket,
  name,
  of_actions,
  positive,
  read_program,
  require_checkout,
  require_mount,
)


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of `plan`."""
  parser.add_argument("actions", nargs="+", help="of build, apply, logs, delete; in this order")
  parser.add_argument("--name", type=name, required=True, help="of the JobSet")
  parser.add_argument("--image", help="REGISTRY/NAME:TAG")
  parser.add_argument("--namespace", default="default")
  parser.add_argument("--context", help="kubectl's own if not given")
  parser.add_argument("--service-account", default="default", help="of the pods; on GKE one that may use the bucket")
  parser.add_argument("--tpu", help="as tpu-v5-lite-podslice")
  parser.add_argument("--topology", help="of the slice of TPUs, as 4x4")
  parser.add_argument("--chips-per-host", type=positive, default=4)
  parser.add_argument("--hosts", type=positive, help="with GPUs")
  parser.add_argument("--gpus-per-host", type=positive)
  parser.add_argument("--gpu", help="on GKE: as nvidia-h100-80gb")
  parser.add_argument("--spot", action="store_true", help="on GKE: nodes that are cheaper, and taken away at any time")
  parser.add_argument("--bucket", help=f"on GKE: a bucket with hierarchical namespace, to be mounted at {MOUNT}")
  parser.add_argument("--claim", help=f"a ReadWriteMany PersistentVolumeClaim, to be mounted at {MOUNT}")
  parser.add_argument("--max-restarts", type=int, default=20)


def plan(args: argparse.Namespace, flags: Sequence[str]) -> list[Step]:
  """The commands for the actions asked for.

  Args:
    args: of `add_flags`.
    flags: of the program.

  Raises:
    InputError: as `manifest`.
  """
  kubectl = ("kubectl", *([f"--context={args.context}"] if args.context else []), f"--namespace={args.namespace}")

  def build() -> list[Step]:
    require_checkout("build")
    _require_image(args)
    options = ("--platform=linux/amd64", f"--build-arg=ACCELERATOR={'tpu' if args.tpu else 'cuda'}")
    return [
      Step(("docker", "build", f"--file={FOLDER}/Dockerfile", *options, f"--tag={args.image}", ".")),
      Step(("docker", "push", args.image), asks=f"push the image {args.image}"),
    ]

  def apply() -> list[Step]:
    objects = manifest(args, flags)
    asks = f"start the JobSet {args.name}, whose nodes may cost money until it ends or is deleted"
    return [*check_bucket(args.bucket), Step((*kubectl, "apply", "--filename=-"), stdin=objects, asks=asks)]

  def logs() -> list[Step]:
    first = f"--selector=jobset.sigs.k8s.io/jobset-name={args.name},batch.kubernetes.io/job-completion-index=0"
    return [Step((*kubectl, "logs", first, "--container=bbqrec", "--tail=1000", "--follow"))]

  def delete() -> list[Step]:
    kinds = "jobsets.jobset.x-k8s.io" if args.tpu else "jobsets.jobset.x-k8s.io,rolebindings,roles"
    # In the foreground: only when its pods are gone can another of its name follow.
    options = ("--cascade=foreground", "--ignore-not-found")
    return [Step((*kubectl, "delete", kinds, args.name, *options), asks=f"delete the JobSet {args.name}")]

  return of_actions(args.actions, [build, apply, logs, delete])


def manifest(args: argparse.Namespace, flags: Sequence[str]) -> str:
  """What `kubectl apply` is given: the JobSet, and with GPUs the right of its pods to find one another.

  Args:
    args: of `add_flags`.
    flags: of the program.

  Raises:
    InputError: if the image, the devices or the storage are not told, or the workdir is not on that storage.
  """
  hosts, devices = _hosts(args)
  _require_image(args)
  program = read_program(flags)
  require_mount(program)
  if bool(args.bucket) == bool(args.claim):
    raise InputError(f"`apply` needs one of --bucket and --claim, which it mounts at {MOUNT}")
  command = ("bash", f"{ON_HOSTS}/container.sh", program.workdir, "python", *program.arguments)
  gke = {
    "gke-tpu-accelerator": args.tpu, "gke-tpu-topology": args.tpu and args.topology, "gke-accelerator": args.gpu,
    "gke-spot": "true" if args.spot else None,
  }  # fmt: skip
  spot = {"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"}
  storage: dict[str, Any] = {"persistentVolumeClaim": {"claimName": args.claim}}
  if args.bucket:
    # Without caches of what exists: the other hosts write there too.
    options = "implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0"
    attributes = {"bucketName": args.bucket, "mountOptions": options}
    storage = {"csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}
  values = {
    "name": args.name, "namespace": args.namespace, "max_restarts": args.max_restarts, "hosts": hosts,
    "service_account": args.service_account, "image": args.image, "devices": devices, "mount": MOUNT,
    # Kubernetes replaces $(NAME) in a command, and $$ by $.
    "command": [word.replace("$", "$$") for word in command],
    "storage": {"name": "storage", **storage},
    "annotations": {"gke-gcsfuse/volumes": "true"} if args.bucket else {},
    "selector": {f"cloud.google.com/{name}": value for name, value in gke.items() if value},
    "tolerations": [spot] if args.spot else [],
    # On GKE a node pool is a slice of TPUs: all pods belong in the same one.
    "exclusive": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"} if args.tpu else {},
  }  # fmt: skip
  filled = {name: json.dumps(value) for name, value in values.items()}
  files = [pathlib.Path(__file__).with_name(name) for name in ("jobset_rbac.yaml", "jobset.yaml")]
  return "".join(string.Template(file.read_text()).substitute(filled) for file in (files[1:] if args.tpu else files))


def _require_image(args: argparse.Namespace) -> None:
  if not args.image:
    raise InputError("--image is missing: `build` and `apply` need it, as REGISTRY/NAME:TAG")


def _hosts(args: argparse.Namespace) -> tuple[int, dict[str, int]]:
  """The number of pods, and the devices of each.

  Raises:
    InputError: unless either a slice of TPUs or the number of hosts and GPUs is told.
  """
  if not args.tpu:
    if not (args.hosts and args.gpus_per_host):
      raise InputError("which devices? `apply` needs --tpu and --topology, or --hosts and --gpus-per-host")
    return args.hosts, {"nvidia.com/gpu": args.gpus_per_host}
  if not re.fullmatch(r"\d+(x\d+){1,2}", args.topology or ""):
    raise InputError(f"--topology={args.topology}: expected the shape of the slice of {args.tpu}, as 4x4 or 2x2x2")
  chips = math.prod(int(side) for side in args.topology.split("x"))
  if chips % args.chips_per_host:
    raise InputError(
      f"--topology={args.topology} has {chips} chips, not a multiple of --chips-per-host={args.chips_per_host}"
    )
  return chips // args.chips_per_host, {"google.com/tpu": args.chips_per_host}
