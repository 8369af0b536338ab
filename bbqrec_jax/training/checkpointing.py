"""Checkpoints of a stage: state, input pipeline and where the run stood, saved together and restored together.

Every checkpoint holds the SHA-256 digests of its files, written after them and before the checkpoint gets its name. One
whose files are not those is passed over.
"""

import asyncio
import contextlib
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from bbqrec_jax.errors import STORAGE_ERRORS, InputError, StorageError
from bbqrec_jax.utils import processes, remote
from bbqrec_jax.utils.files import plain_path
from bbqrec_jax.utils.json_files import read_json, write_json
from bbqrec_jax.utils.messages import warn

_DIGESTS = "digests.json"
_TIMES = "_CHECKPOINT_METADATA"  # When the save began and ended: orbax writes it once more after the digests.


_GRACE = 60.0  # Seconds that what was begun may take to end.


class _FinishingLoop(asyncio.SelectorEventLoop):
  """An event loop that closes when what it has begun is over.

  orbax closes its own as soon as one array of many fails; those of the others that tensorstore still answers then, and
  those that never began, would each tell of it on standard error.
  """

  def close(self) -> None:
    """Waits for the tasks that are left, whose results nobody wants."""
    pending = set() if self.is_closed() else asyncio.all_tasks(self)
    if pending:
      done, _ = self.run_until_complete(asyncio.wait(pending, timeout=_GRACE))
      for task in done:
        task.cancelled() or task.exception()  # Or asyncio would tell that nobody has looked at it.
    super().close()


@contextlib.contextmanager
def _finishing_loops() -> Iterator[None]:
  """Makes every event loop that is made meanwhile, in whatever thread, one that finishes."""
  policy = asyncio.get_event_loop_policy()
  before = policy.new_event_loop
  policy.new_event_loop = _FinishingLoop  # type: ignore[method-assign]
  try:
    yield
  finally:
    policy.new_event_loop = before  # type: ignore[method-assign]


class _NewestAndTheirBest(checkpoint_managers.PreservationPolicy):
  """Keeps the newest checkpoints, and for each of them the one that the run called its best by then.

  So each can be gone on from. No other record of metrics can disagree.
  """

  def __init__(self, keep: int):
    self._keep, self.best = keep, dict[int, int]()

  def should_preserve(self, checkpoints, *, context):
    del context
    newest = sorted(checkpoint.step for checkpoint in checkpoints)[-self._keep :]
    kept = {*newest, *(self.best.get(step) for step in newest)}
    return [checkpoint.step in kept for checkpoint in checkpoints]


def _digest(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _write_digests(folder: pathlib.Path) -> None:
  files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _TIMES)
  write_json(folder / _DIGESTS, {str(path.relative_to(folder)): _digest(path) for path in files})


def damage(folder: pathlib.Path) -> str:
  """What is wrong with the files of a checkpoint, "" if nothing is.

  Raises:
    OSError: if the disk cannot be read; that says nothing about the checkpoint.
  """
  if not (folder / _DIGESTS).is_file():
    return f"{folder / _DIGESTS} is missing"
  try:
    digests = read_json(folder / _DIGESTS)
  except InputError as error:
    return str(error)
  for name, digest in digests.items():
    if not (folder / name).is_file():
      return f"{folder / name} is missing"
    if _digest(folder / name) != digest:
      return f"{folder / name} was changed or cut off after it was written"
  return ""


def _restoring(like: Any) -> Any:
  """Shapes, types and places of a state."""
  return jax.tree.map(ocp.utils.to_shape_dtype_struct, like)


def restore_state(directory: pathlib.Path, step: int, like: Any, *, strict: bool = True) -> Any:
  """The state saved at a step, without its input pipeline; nothing is written.

  Args:
    directory: of the stage's checkpoints.
    step: of the checkpoint.
    like: a state of the same structure, placed where the restored one shall be.
    strict: refuse arrays of another shape; False where rows that fill arrays up are as many as the devices that saved
      them needed (see `Partitioner.fills_rows`).

  Raises:
    InputError: if the checkpoint is missing or damaged (names the file), or is of a state of another structure.
  """
  folder = directory.absolute() / str(step)
  problem = damage(folder)
  if problem:
    raise InputError(
      f"{problem}: checkpoint {step} cannot be used; restore it from a copy, or remove the workdir's results.json and"
      " start the run again, which trains anew what is lost, to the same numbers"
    )
  with plain_path(folder) as plain:
    try:
      with _finishing_loops(), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(plain / "state", _restoring(like), strict=strict)
    except (ValueError, KeyError) as error:
      reason = str(error)[:200]
      raise InputError(
        f"{folder}: expected a checkpoint that fits the config, found none ({reason}); restore it"
      ) from error


def read_params(directory: pathlib.Path, step: int) -> Any:
  """The parameters saved at a step, as nested dictionaries of arrays on the host, whatever state they are of.

  Args:
    directory: of the stage's checkpoints.
    step: of the checkpoint.

  Raises:
    InputError: if the checkpoint is missing or damaged.
  """
  folder = directory.absolute() / str(step)
  problem = damage(folder)
  if problem:
    raise InputError(f"{problem}: checkpoint {step} cannot be used; restore it from a copy")
  with plain_path(folder) as plain, _finishing_loops(), ocp.PyTreeCheckpointer() as checkpointer:
    about = checkpointer.metadata(plain / "state").item_metadata
    host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), about.tree)
    return checkpointer.restore(plain / "state", restore_args=host)["params"]


class Checkpointer:
  """Keeps the newest checkpoints of a stage and the best one."""

  def __init__(self, directory: pathlib.Path, *, keep: int = 2, strict: bool = True):
    """Opens (or makes) the folder of one stage; removes what unfinished saves have left there.

    Args:
      directory: the folder.
      keep: how many of the newest checkpoints are kept, at least 1. From 2 on, a damaged one has one before it.
      strict: see `restore_state`.

    Raises:
      StorageError: if the folder cannot be made.
    """
    self._directory = directory.absolute()
    self._policy = _NewestAndTheirBest(keep)
    self._saving, self._read_back, self._strict = -1, -1, strict
    with self._storing("open the folder of checkpoints"), contextlib.ExitStack() as stack:
      self._directory.mkdir(parents=True, exist_ok=True)
      self._manager = ocp.CheckpointManager(
        stack.enter_context(plain_path(self._directory)),
        options=ocp.CheckpointManagerOptions(
          preservation_policy=self._policy,
          cleanup_tmp_directories=True,
          async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        ),
        item_handlers={
          "state": ocp.StandardCheckpointHandler(),
          "data": ocp.JsonCheckpointHandler(),
          "progress": ocp.JsonCheckpointHandler(),
        },
      )
      stack.enter_context(_finishing_loops())
      self._stack = stack.pop_all()

  def _seal(self) -> None:
    """Called in the thread that saves, when every process has written and before the folder gets its final name."""
    if not processes.is_first():
      return
    (folder,) = self._directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")
    _write_digests(folder)

  @contextlib.contextmanager
  def _storing(self, what: str) -> Iterator[None]:
    """Makes one kind of error of all that orbax and the libraries below it raise when a disk takes no more."""
    try:
      yield
    except (OSError, ValueError) as error:
      reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
      known = [os.strerror(number) for number in STORAGE_ERRORS if os.strerror(number) in reason] or [reason[:300]]
      raise StorageError(
        f"{self._directory}: could not {what}: {known[0]}; mend that, and the same command goes on from the last"
        " checkpoint"
      ) from error

  def save(self, step: int, state: Any, data: grain.DatasetIterator, progress: dict[str, Any]) -> None:
    """Saves in the background, all but the first time; does nothing if this step is saved already.

    Of a workdir that is kept at a URL, the checkpoint is there at the end.

    Args:
      step: steps taken.
      state: of the training.
      data: the input pipeline's iterator.
      progress: where the run stands; the checkpoint of its `best_step` is kept as long as this one.

    Raises:
      StorageError: if this checkpoint, or the one before it in the background, could not be written or read back.
    """
    self.wait()
    if step in self._manager.all_steps():
      return
    self._policy.best[step] = progress["best_step"]
    first, self._saving = self._saving == -1, step
    with self._storing(f"write checkpoint {step}"):
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          # Alike in all processes, so that any number of them can go on: each takes its rows of the same batches.
          data=ocp.args.JsonSave(data.get_state()),
          # A copy: the run goes on and changes its own while this one is written.
          progress=ocp.args.JsonSave(dict(progress)),
        ),
      )
    if first or remote.is_mirrored(self._directory):
      self.wait()  # What is written here and cannot be read is to be found out now, and not hours later.
    remote.keep(self._directory)

  def restore_latest(self, like: Any, data: grain.DatasetIterator) -> tuple[Any, dict[str, Any]] | None:
    """(state, progress) of the latest whole checkpoint, `data` being moved to its place; None if there is none.

    A checkpoint that is damaged, or whose best one is, is passed over with a warning and renamed to STEP.set_aside.

    Args:
      like: a state of the same structure, placed where the restored one shall be.
      data: the input pipeline's iterator.
    """
    processes.wait_for_all("the checkpoints are looked at")
    damages = {
      step: damage(self._directory / str(step)) or self._unreadable(step) for step in sorted(self._manager.all_steps())
    }
    progress = {step: self._progress(step) for step, problem in damages.items() if not problem}
    processes.wait_for_all("the checkpoints have been looked at")
    for step in reversed(damages):
      problem = damages[step]
      if not problem:
        best = progress[step]["best_step"]
        if best in (-1, step) or damages.get(best) == "":
          break
        problem = f"the best one by then, {best}, cannot be used: {damages.get(best, 'it is missing')}"
      self._set_aside(step, problem)
    else:
      return None
    self._policy.best = {other: where["best_step"] for other, where in progress.items() if other <= step}
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(_restoring(like), strict=self._strict),
        data=ocp.args.JsonRestore(),
      ),
    )
    data.set_state(restored["data"])
    return restored["state"], progress[step]

  def _unreadable(self, step: int) -> str:
    """Why the arrays of a checkpoint cannot be opened, though its files are as they were written; "" if they can."""
    try:
      self._manager.item_metadata(step)["state"]
    except (OSError, ValueError, KeyError) as error:
      reason = " ".join(str(error).split())[:300]
      return f"{self._directory / str(step)} was written and cannot be read back ({type(error).__name__}: {reason})"
    return ""

  def _progress(self, step: int) -> dict[str, Any]:
    return self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]

  def _set_aside(self, step: int, problem: str) -> None:
    folder, aside = self._directory / str(step), self._directory / f"{step}.set_aside"
    warn(f"checkpoint {step} is passed over, and is now {aside}: {problem}")
    with self._storing(f"set checkpoint {step} aside"):
      if processes.is_first():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
      processes.wait_for_all(f"checkpoint {step} is set aside")
      self._manager.reload()

  def wait(self) -> None:
    """Waits for the save in flight, and opens every array of what it wrote.

    Raises:
      StorageError: if it failed, or left what cannot be read.
    """
    with self._storing(f"write checkpoint {self._saving}"):
      self._manager.wait_until_finished()
    if self._read_back == self._saving or not processes.is_first():
      return
    problem = self._unreadable(self._saving)
    if problem:
      raise StorageError(f"{problem}; use another --workdir, or mend what it lies on and give the same command again")
    self._read_back = self._saving

  def close(self) -> None:
    """Waits for the save in flight, and closes.

    Raises:
      StorageError: as `wait`.
    """
    with self._storing(f"write checkpoint {self._saving}"), self._stack:
      self._manager.close()
