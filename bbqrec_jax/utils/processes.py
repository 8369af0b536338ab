"""Runs of several processes, each with its own devices: how they join, and values that they agree on."""

import contextlib
import itertools
import os
import re
import signal
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from bbqrec_jax.errors import InputError
from bbqrec_jax.utils import last_words

# Variables in which launchers say how many processes they have started.
_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS")

# Seconds without a sign of life after which a process is lost, and JAX ends the others. Its own threads give the signs,
# two in that time: neither compilation nor anything else that Python waits for holds them up.
LOST_AFTER = 40
# What JAX's libraries raise where a process is lost, and seldom else: the name of a status before the message.
_OF_OTHERS = re.compile(r"\b(?:ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN): ")


def join(
  mode: str, *, coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
  """Joins the processes of a run, before anything else is asked of JAX.

  Args:
    mode: "on", "off", or "auto": where JAX finds a cluster (TPU pods, Slurm, Open MPI, Kubernetes) or all that follows
      is given, and otherwise not.
    coordinator: host:port of the first process, where JAX cannot find it out.
    num_processes: how many there are, likewise.
    process_id: which of them this is, from 0, likewise.

  Raises:
    InputError: if "on" finds nothing to join, what is given does not fit together, or the others cannot be reached.
  """
  given = [value for value in (coordinator, num_processes, process_id) if value is not None]
  if given and (mode == "off" or len(given) < 3):
    raise InputError(
      f"--distributed={mode} got {len(given)} of --coordinator, --num_processes and --process_id: give all three with"
      " on or auto, or none"
    )
  if process_id is not None and num_processes is not None and not 0 <= process_id < num_processes:
    raise InputError(f"--process_id must be from 0 to {num_processes - 1}, --num_processes less 1, got {process_id}")
  if mode == "off" or (mode == "auto" and not given and _alone()):
    return
  try:
    jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=LOST_AFTER)
  except Exception as error:  # A cluster's own client raises what it likes.
    nothing_found = isinstance(error, ValueError) and not given and "JAX_COORDINATOR_ADDRESS" not in os.environ
    if nothing_found and mode == "auto":
      return
    if nothing_found:
      raise InputError(
        "--distributed=on found no cluster that JAX knows: give --coordinator=host:port, --num_processes and"
        " --process_id, or run alone with --distributed=off"
      ) from error
    raise InputError(
      f"this process cannot join the others of its run ({error}): mend the cluster's settings, or run alone with"
      " --distributed=off"
    ) from error
  if jax.distributed.is_initialized():
    _tell_in_one_line()


def _tell_in_one_line() -> None:
  """Lets another process write what this one writes to standard error, see `last_words`, if one can be started."""
  reader, writer = os.pipe()
  with contextlib.suppress(OSError):
    os.posix_spawn(
      sys.executable,
      [sys.executable, "-I", "-S", last_words.__file__, str(LOST_AFTER)],
      os.environ,
      file_actions=[(os.POSIX_SPAWN_DUP2, reader, 0), (os.POSIX_SPAWN_DUP2, 2, 1)],
      setsigmask=[signal.SIGINT, signal.SIGTERM, signal.SIGHUP],  # It ends when this process has ended.
    )
    os.dup2(writer, 2)
  os.close(reader)
  os.close(writer)


@contextlib.contextmanager
def ended_together() -> Iterator[None]:
  """Keeps a process from telling of what failed because another is lost: JAX ends it, and `last_words` tells.

  What fails so waits for that end, one and a half times `LOST_AFTER` at most; then it is raised after all.
  """
  try:
    yield
  except Exception as error:
    if jax.distributed.is_initialized() and of_others(error):
      time.sleep(1.5 * LOST_AFTER)
    raise


def of_others(error: BaseException | None) -> bool:
  """Whether an error, or one that it was made of, may be due to the loss of another process."""
  seen: set[int] = set()
  while error is not None and id(error) not in seen:
    if _OF_OTHERS.search(str(error)):
      return True
    seen.add(id(error))
    error = error.__cause__ or error.__context__
  return False


def _alone() -> bool:
  """Whether a launcher says that this is the only process; JAX would give a Slurm task one GPU of several."""
  sizes = [os.environ[name] for name in _LAUNCHERS if name in os.environ]
  return sizes[:1] == ["1"]


def is_first() -> bool:
  """Whether this process writes results, logs and messages: one does for all."""
  # Of a process that is alone JAX is not asked: it would start its devices to answer.
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def several() -> bool:
  """Whether this process is one of several."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def wait_for_all(what: str) -> None:
  """Waits until every process is here, so that what the first one wrote can be read; `what` names the place."""
  if several():
    multihost_utils.sync_global_devices(what)


def of_the_first(array: np.ndarray) -> np.ndarray:
  """What the first process has, in all of them: what each computes for itself may differ in the last digit."""
  return np.asarray(multihost_utils.broadcast_one_to_all(array)) if several() else array


def text_of_the_first(text: str) -> str:
  """What the first process says, in all of them; of at most 4,096 characters."""
  said = np.zeros(4096, np.int32)
  said[: len(text)] = list(map(ord, text))
  return "".join(map(chr, of_the_first(said))).rstrip("\0") if several() else text


_turns = itertools.count()


def told_to_stop() -> bool:
  """Whether the processes agree to stop now, some time after SIGTERM or a preemption notice came to any of them.

  Every process must call it once a step. It is False where a process is alone: nobody needs to agree.
  """
  return several() and multihost_utils.reached_preemption_sync_point(next(_turns))
