"""Monitors the metrics of training steps: divergence, steps to skip, and spikes of the loss."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.errors import Diverged
from bbqrec_jax.training.logging import MetricsLog
from bbqrec_jax.training.settings import Safeguards
from bbqrec_jax.utils.messages import warn
from bbqrec_jax.utils.processes import several

_WINDOW = 100  # Losses that the median is taken of.
_ENOUGH = 20  # Fewer say nothing.
_SHOWN = 10  # Items that a message names.
_ITEMS = ("items", "history_items", "targets")  # What a batch calls its items.


def items_of(batch: Any) -> dict[str, np.ndarray]:
  """The arrays of a batch from which `distinct_items` finds its items."""
  if not isinstance(batch, Mapping):
    return {}
  return {name: batch[name] for name in (*_ITEMS, "segments") if name in batch}


def distinct_items(parts: Mapping[str, np.ndarray]) -> list[int]:
  """The distinct items of a batch, sorted, without padding."""
  real = np.asarray(parts.get("segments", ())) > 0
  found: set[int] = set()
  for name in _ITEMS:
    if name in parts:
      items = np.asarray(parts[name])
      found.update((items[real] if items.shape == real.shape else items).ravel().tolist())
  return sorted(found)


class Monitor:
  """Checks the metrics of every step, several steps at a time, so that the devices need not wait for the host.

  Its memory is part of the run's progress, so that a resumed run judges as an uninterrupted one.
  """

  def __init__(self, name: str, safeguards: Safeguards, log: MetricsLog, item_ids: ItemIds | None = None):
    """For the stage called `name`; what it says of items, it says by their ids."""
    self._name, self._safeguards, self._log, self._item_ids = name, safeguards, log, item_ids

  @staticmethod
  def fresh() -> dict[str, Any]:
    """What is remembered before the first step."""
    return {"skipped": 0, "skipped_in_a_row": 0, "losses": []}

  def look(
    self, step: int, recent: list[tuple[dict[str, Any], list[dict[str, np.ndarray]]]], memory: Mapping[str, Any]
  ) -> tuple[dict[str, Any], tuple[int, dict[str, float]] | None]:
    """Judges the steps up to `step`.

    Args:
      step: the last step of `recent`.
      recent: of each call since the last look: metrics on the devices, scalars or [steps], and `items_of` the batch of
        each of its steps.
      memory: what the last look returned, or `fresh`.

    Returns:
      What to remember, and the last step that was not skipped with its metrics (None if all were).

    Raises:
      Diverged: at a step that is not finite, or at one skipped step too many in a row; names stage, step, terms and the
        items of the batch, all of which are logged.
    """
    memory = {name: memory[name] for name in self.fresh()}
    losses, spikes = list(memory["losses"]), []
    latest = None
    fetched = jax.device_get([metrics for metrics, _ in recent])
    columns = [{name: np.ravel(value).tolist() for name, value in metrics.items()} for metrics in fetched]
    steps = [
      ({name: column[index] for name, column in call.items()}, parts)
      for call, (_, batches) in zip(columns, recent, strict=True)
      for index, parts in enumerate(batches)
    ]
    for number, (values, parts) in enumerate(steps, start=step - len(steps) + 1):
      broken = [name for name, value in values.items() if not math.isfinite(value)]
      if broken:
        memory["skipped"] += 1
        memory["skipped_in_a_row"] += 1
        self._not_finite(number, {name: values[name] for name in broken}, distinct_items(parts), memory)
        continue
      memory["skipped_in_a_row"] = 0
      latest = number, values
      spikes += self._spike(number, values["loss"], losses)
      losses = [*losses, values["loss"]][-_WINDOW:]
    if spikes:
      ratio, number = max(spikes)
      others = f", and {len(spikes) - 1} steps near it are high too" if len(spikes) > 1 else ""
      warn(f"{self._name}: the loss of step {number} is {ratio:.1f} times the median of those before it{others}")
    return memory | {"losses": losses}, latest

  def _not_finite(self, step: int, broken: dict[str, float], rows: list[int], memory: Mapping[str, Any]) -> None:
    items: list[Any] = rows if self._item_ids is None else [self._item_ids[row] for row in rows]
    # The terms that broke, not the sums and norms that follow from them, where there are such.
    terms = {name: value for name, value in broken.items() if name not in ("loss", "gradient_norm")} or broken
    what = ", ".join(f"{name} is {value}" for name, value in terms.items())
    shown = ", ".join(map(str, items[:_SHOWN])) + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")
    where = f"{self._name}: {what} at step {step}, whose batch (number {step - 1}) holds items {shown or 'unknown'}"
    skipping = self._safeguards.on_nonfinite == "skip"
    many = memory["skipped_in_a_row"] >= self._safeguards.max_skipped
    kind = "skipped" if skipping and not many else "diverged"
    # As text: JSON knows no such numbers.
    record = {"terms": {name: str(value) for name, value in broken.items()}, "batch": step - 1, "items": items}
    self._log.write(self._name, kind, step, record)
    if not skipping:
      raise Diverged(
        f"{where}; what was saved before that is kept. Set --config.on_nonfinite=skip to go on without such steps, or a"
        " lower learning rate or clip norm in another workdir"
      )
    if many:
      raise Diverged(
        f"{where}; so have been {memory['skipped_in_a_row']} steps in a row, and none of them was applied. Set a lower"
        " learning rate or clip norm in another workdir, or a higher --config.max_skipped"
      )
    warn(f"{where}; the step is skipped, the {memory['skipped']}. of this stage")

  def _spike(self, step: int, loss: float, before: list[float]) -> list[tuple[float, int]]:
    """Logs a spike of the loss: [(its ratio to the median, its step)], or []."""
    if len(before) < _ENOUGH:
      return []
    median = statistics.median(before)
    if not 0 < median * self._safeguards.spike_factor < loss:
      return []
    self._log.write(self._name, "spike", step, {"loss": loss, "median": median})
    return [(loss / median, step)]


def _finite(array: jax.Array) -> bool:
  """Whether all that this process holds of an array is finite.

  Checked on the host, where a checkpoint goes anyway: a jitted check of all arrays takes longer to compile.
  """
  parts = [part.data for part in array.addressable_shards if part.replica_id == 0]
  return all(bool(np.isfinite(np.asarray(part)).all()) for part in parts)


def require_finite(name: str, step: int, state: Any) -> None:
  """Refuses a state that no checkpoint should hold.

  A step's metrics are those of the parameters it starts from: its own update shows in the next step's.

  Raises:
    Diverged: if a number of the state is not finite; names the stage, the step and the array.
  """
  leaves = jax.tree_util.tree_leaves_with_path(state)
  leaves = [(path, leaf) for path, leaf in leaves if jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)]
  finite = np.array([_finite(leaf) for _, leaf in leaves])
  if several():
    finite = multihost_utils.process_allgather(finite).all(axis=0)
  for (path, _), fine in zip(leaves, finite, strict=True):
    if not fine:
      raise Diverged(
        f"{name}: {jax.tree_util.keystr(path)} is not finite after step {step}; what was saved before that is"
        " kept. Set a lower learning rate or clip norm in another workdir"
      )
