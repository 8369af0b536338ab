"""Tells Weights & Biases or MLflow of a run, after it or while it trains.

    bbqrec track --workdir=runs/mine --to=wandb
    bbqrec track --workdir=runs/mine --to=mlflow --offline
    bbqrec track --workdir=runs/mine --to=mlflow --follow

What the tracker was told already is not told again. `--offline` needs no network and no account: W&B's files lie in
wandb/ of the workdir, for `wandb sync`, MLflow's in mlruns/, for `mlflow ui --backend-store-uri`. Otherwise the
trackers' own variables say where to (WANDB_API_KEY, MLFLOW_TRACKING_URI). TensorBoard needs no telling:
`tensorboard --logdir=runs`.
"""

import time

from absl import flags

from bbqrec_jax.command_line import define_path, quiet_flags, start, writing
from bbqrec_jax.errors import InputError, refuse
from bbqrec_jax.utils.files import is_given


def main(argv: list[str]) -> None:
  """Sends what is there, and says how much that was."""
  del argv
  from bbqrec_jax.runs.tracking import TRACKERS, track

  options = quiet_flags()
  workdir = options.workdir

  def wait() -> bool:
    if options.follow:
      time.sleep(options.every)
    return options.follow

  try:
    if not is_given(workdir / "config.json"):
      raise InputError(f"{workdir}/config.json does not exist: --workdir must be that of a run of bbqrec train")
    tracker = TRACKERS[options.to](options.project, offline=options.offline, folder=workdir)
    with writing(workdir):
      sent = track(workdir, tracker, name=options.to, wait=wait)
  except InputError as error:
    refuse(error)
  print(f"{sent} records of {workdir} sent to {options.to}, project {options.project}")


def program() -> None:
  """Defines the flags and runs the program."""
  define_path("workdir", "The workdir of a run.")
  flags.DEFINE_enum("to", None, ["wandb", "mlflow"], "The tracker.")
  flags.DEFINE_string("project", "bbqrec", "The project (W&B) or experiment (MLflow).")
  flags.DEFINE_bool("offline", False, "Keep everything in the workdir.")
  flags.DEFINE_bool("follow", False, "Go on until the run is finished.")
  flags.DEFINE_float("every", 10.0, "Seconds between two looks, with --follow.", lower_bound=0.1)
  flags.mark_flags_as_required(["workdir", "to"])
  start(main)
