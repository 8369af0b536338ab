"""Checkpoints of a stage: state, input pipeline and where the run stood, saved together and restored together."""

import pathlib
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers


class Checkpointer:
  """Keeps the latest checkpoint and the best one."""

  def __init__(self, directory: pathlib.Path, *, metric: str | None):
    """Opens (or makes) the folder.

    Args:
      directory: where checkpoints of this stage live.
      metric: the validation metric whose highest value is best; None keeps the latest alone.
    """
    keep: list[checkpoint_managers.PreservationPolicy] = [checkpoint_managers.LatestN(1)]
    if metric is not None:
      keep.append(
        checkpoint_managers.BestN(
          get_metric_fn=lambda metrics: metrics[metric], n=1, keep_checkpoints_without_metrics=False
        )
      )
    self._metric = metric
    self._manager = ocp.CheckpointManager(
      directory.absolute(),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep), cleanup_tmp_directories=True
      ),
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        "data": grain.checkpoint.CheckpointHandler(),
        "progress": ocp.JsonCheckpointHandler(),
      },
    )

  def save(
    self,
    step: int,
    state: Any,
    data: grain.DatasetIterator,
    progress: dict[str, Any],
    metrics: dict[str, float] | None = None,
  ) -> None:
    """Saves in the background; does nothing if this step is saved already."""
    if step in self._manager.all_steps():
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=grain.checkpoint.CheckpointSave(data),
        progress=ocp.args.JsonSave(progress),
      ),
      metrics=metrics,
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
