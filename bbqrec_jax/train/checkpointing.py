"""Checkpoints of a stage: state, input pipeline and where the run stood, saved together and restored together."""

import pathlib
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers


class _LatestAndBest(checkpoint_managers.PreservationPolicy):
  """Keeps the newest checkpoint and the one that the run calls its best; no other record of metrics can disagree."""

  best_step = -1

  def should_preserve(self, checkpoints, *, context):
    del context
    latest = max((checkpoint.step for checkpoint in checkpoints), default=-1)
    return [checkpoint.step in (latest, self.best_step) for checkpoint in checkpoints]


class Checkpointer:
  """Keeps the latest checkpoint and the best one."""

  def __init__(self, directory: pathlib.Path):
    """Opens (or makes) the folder of one stage."""
    self._policy = _LatestAndBest()
    self._manager = ocp.CheckpointManager(
      directory.absolute(),
      options=ocp.CheckpointManagerOptions(preservation_policy=self._policy, cleanup_tmp_directories=True),
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        "data": grain.checkpoint.CheckpointHandler(),
        "progress": ocp.JsonCheckpointHandler(),
      },
    )

  def save(self, step: int, state: Any, data: grain.DatasetIterator, progress: dict[str, Any]) -> None:
    """Saves in the background; does nothing if this step is saved already.

    Args:
      step: steps taken.
      state: of the training.
      data: the input pipeline's iterator.
      progress: where the run stands; its `best_step` is kept besides the latest.
    """
    if step in self._manager.all_steps():
      return
    self._policy.best_step = progress["best_step"]
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=grain.checkpoint.CheckpointSave(data),
        # A copy: the run goes on and changes its own while this one is written.
        progress=ocp.args.JsonSave(dict(progress)),
      ),
    )

  def restore_latest(self, like: Any, data: grain.DatasetIterator) -> tuple[Any, dict[str, Any]] | None:
    """(state, progress) of the latest checkpoint, `data` being moved to its place; None if there is none.

    Args:
      like: a state of the same structure, placed where the restored one shall be.
      data: the input pipeline's iterator.
    """
    step = self._manager.latest_step()
    if step is None:
      return None
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, like)),
        data=grain.checkpoint.CheckpointRestore(data),
        progress=ocp.args.JsonRestore(),
      ),
    )
    return restored["state"], restored["progress"]

  def restore_state(self, step: int, like: Any) -> Any:
    """The state saved at `step`, without its input pipeline."""
    self._manager.wait_until_finished()
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
    return restored["state"]

  def close(self) -> None:
    """Waits for saves in flight."""
    self._manager.wait_until_finished()
    self._manager.close()
