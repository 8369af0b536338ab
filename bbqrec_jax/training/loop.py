"""The training loop that both stages share."""

import contextlib
import dataclasses
import math
import pathlib
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain

from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.training.checkpointing import Checkpointer, restore_state
from bbqrec_jax.training.logging import MetricsLog, Progress
from bbqrec_jax.training.monitor import Monitor, items_of, require_finite
from bbqrec_jax.training.partitioning import Partitioner, StepFunction
from bbqrec_jax.training.settings import Safeguards
from bbqrec_jax.training.state import TrainState
from bbqrec_jax.training.step import in_turn, side_by_side, skip_nonfinite
from bbqrec_jax.utils import processes
from bbqrec_jax.utils.messages import say
from bbqrec_jax.utils.signals import Interrupted, deferred_signals, immediate_signals


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a stage does when.

  Attributes:
    name: of the stage.
    steps: how many there are.
    log_every: steps between training metrics; they are looked at before each evaluation too.
    evaluate_every: steps between evaluations, each followed by a checkpoint.
    evaluate: state -> metrics.
    select: the metric whose highest value is the best model; None takes the last state.
    patience: evaluations without a better one after which training stops.
    before: step -> (state -> state), run before that step, on the host.
    steps_per_call: how many steps one call of the devices does, where nothing is due between them.
    item_ids: what messages call the items of a batch; their rows, if it is None.
    safeguards: against what may befall the run.
  """

  name: str
  steps: int
  log_every: int
  evaluate_every: int
  evaluate: Callable[[TrainState], dict[str, float]]
  select: str | None = None
  patience: int = 0
  before: Mapping[int, Callable[[TrainState], TrainState]] = dataclasses.field(default_factory=dict)
  steps_per_call: int = 1
  item_ids: ItemIds | None = None
  safeguards: Safeguards = dataclasses.field(default_factory=Safeguards)

  def due(self, step: int) -> bool:
    """Whether an evaluation follows this step."""
    return step % self.evaluate_every == 0 or step >= self.steps

  def looks(self, step: int) -> bool:
    """Whether the training metrics are looked at after this step."""
    return step % self.log_every == 0 or self.due(step)

  def at_once(self, step: int) -> int:
    """How many steps the call after this step does: `steps_per_call`, or 1 where something is due before they end.

    No other number: each would be a program to compile.
    """
    within = range(step + 1, step + self.steps_per_call)
    return 1 if any(self.looks(inner) or inner in self.before for inner in within) else self.steps_per_call


def compiled_step(step: StepFunction, safeguards: Safeguards, partitioner: Partitioner) -> StepFunction:
  """A step as `fit` takes it, compiled once for all states and data of the same shapes.

  Args:
    step: see `training.partitioning`.
    safeguards: what it does about an update that is not finite.
    partitioner: how it meets devices.

  Returns:
    (state, shared, batches) -> (the state after a step with each batch, the metrics: of one batch as the step gives
    them, of several [len(batches)] arrays). Each number of batches is a program of its own.
  """
  step = skip_nonfinite(step) if safeguards.on_nonfinite == "skip" else step
  one, several = partitioner.compile_step(step), partitioner.compile_step(in_turn(step))

  def run(state: Any, shared: Any, batches: Sequence[Any]) -> tuple[Any, Any]:
    if len(batches) == 1:
      return one(state, shared, batches[0])
    return several(state, shared, side_by_side(batches))

  return run


def fit(
  plan: Plan,
  state: TrainState,
  shared: Any,
  step: StepFunction,
  batches: grain.IterDataset,
  *,
  partitioner: Partitioner,
  directory: pathlib.Path,
  log: MetricsLog,
) -> tuple[TrainState, dict[str, Any]]:
  """Trains from the last checkpoint in `directory`, or from `state`, to the end of the plan.

  The order of a turn is: step, training metrics, evaluation, checkpoint. A checkpoint so holds all that came of its
  step, and the run goes on from it with the next batch as if it had never stopped.

  A signal stops the run after the call that is underway. What happens between steps, `before` and `evaluate`, is given
  up at once and done again by the run that goes on.

  Args:
    plan: the stage.
    state: the first state, placed by the partitioner.
    shared: data that every step is given, likewise.
    step: by `compiled_step`, of the plan's safeguards.
    batches: the input pipeline.
    partitioner: how steps meet devices.
    directory: for checkpoints.
    log: for metrics.

  Returns:
    The best state by `plan.select` (or the last), and the progress record: `step`, `evaluated_step`, `best_step`,
    `best`, `worse`, `finished`, what `Monitor` remembers (`skipped` steps among it), `training_seconds`,
    `evaluation_seconds` and `checkpoint_seconds` (the loop waited so long for them), all over every start of the run.

  Raises:
    Interrupted: after a signal, once a checkpoint is written.
    Diverged: if a training metric is not finite (see `Safeguards`), or a state that was to be saved is not.
    StorageError: if a checkpoint could not be written.
    InputError: if the best checkpoint was damaged meanwhile.
  """
  with deferred_signals() as caught, contextlib.ExitStack() as stack:
    data = iter(batches)
    stack.callback(data.close)
    checkpointer = Checkpointer(directory, keep=plan.safeguards.keep_checkpoints, strict=not partitioner.fills_rows)
    stack.callback(checkpointer.close)
    progress: dict[str, Any] = {
      "step": 0, "evaluated_step": 0, "best_step": -1, "best": -math.inf, "worse": 0, "finished": False,
      "training_seconds": 0.0, "evaluation_seconds": 0.0, "checkpoint_seconds": 0.0, **Monitor.fresh(),
    }  # fmt: skip
    restored = checkpointer.restore_latest(partitioner.to_checkpoint(state), data)
    if restored is not None:
      state, progress = partitioner.from_checkpoint(restored[0], state), restored[1]
      if not progress["finished"]:
        say(f"{plan.name}: going on from step {progress['step']}")
    log.resume(plan.name, progress["step"], evaluated_step=progress["evaluated_step"])
    monitor = Monitor(plan.name, plan.safeguards, log, plan.item_ids)
    compiled: set[int] = set()  # Steps per call.
    recent: list[Any] = []  # Of the calls since they were last looked at: metrics, and what each batch held.
    bar = Progress(plan.name, total=plan.steps, done=progress["step"])
    stack.callback(bar.close)
    clock = time.monotonic()

    def spent(kind: str) -> None:
      """Counts the seconds since the last call."""
      nonlocal clock
      before, clock = clock, time.monotonic()
      progress[f"{kind}_seconds"] += clock - before

    def look(*, logging: bool) -> None:
      """Judges the recent steps. Done before every checkpoint: none is ever written of a state that has diverged."""
      memory, latest = monitor.look(progress["step"], recent, progress)
      progress.update(memory)
      recent.clear()
      if logging and latest is not None:
        number, values = latest
        log.write(plan.name, "train", number, values)
        bar.report({"loss": values["loss"]})

    def save() -> None:
      require_finite(plan.name, progress["step"], state)
      checkpointer.save(progress["step"], partitioner.to_checkpoint(state), data, progress)

    while not progress["finished"] and not caught:
      try:
        # A run that was stopped amid an evaluation goes on with it.
        if not plan.due(progress["step"]) or progress["evaluated_step"] == progress["step"]:
          if progress["step"] in plan.before:
            with immediate_signals():
              state = plan.before[progress["step"]](state)
          taken = [next(data) for _ in range(plan.at_once(progress["step"]))]
          new, started = len(taken) not in compiled, time.monotonic()
          if new:
            say(f"{plan.name}: compiling ...")
          state, metrics = step(state, shared, taken)
          if new:
            say(f"{plan.name}: compiled in {time.monotonic() - started:.0f} s")
            compiled.add(len(taken))
          progress["step"] += len(taken)
          recent.append((metrics, [items_of(batch) for batch in taken]))
          bar.advance(len(taken))
          if processes.told_to_stop():
            caught.append(signal.SIGTERM)
          if plan.looks(progress["step"]):
            look(logging=True)
        if plan.due(progress["step"]):
          spent("training")
          with immediate_signals():
            values = plan.evaluate(state)
          spent("evaluation")
          log.write(plan.name, "validation", progress["step"], values)
          progress |= _judge(plan, progress, values)
          save()
          spent("checkpoint")
      except Interrupted as stop:
        caught.append(stop.signum)
    if caught:
      if recent:
        look(logging=False)
      spent("training")
      if progress["step"]:
        save()
      checkpointer.wait()
      raise Interrupted(caught[0])
    checkpointer.wait()
    spent("checkpoint")
    if plan.select is not None:
      # Read back even if it is the last: a run is done when what others will restore is there.
      like = partitioner.to_checkpoint(state)
      best = restore_state(directory, progress["best_step"], like, strict=not partitioner.fills_rows)
      state = partitioner.from_checkpoint(best, state)
  return state, progress


def _judge(plan: Plan, progress: dict[str, Any], values: dict[str, float]) -> dict[str, Any]:
  """What an evaluation changes in the record of the best model."""
  step = progress["step"]
  changes: dict[str, Any] = {"evaluated_step": step, "finished": step >= plan.steps}
  if plan.select is not None:
    value = values[plan.select]
    say(f"{plan.name} {step}/{plan.steps}  validation {plan.select} {value:.4f}")
    if value > progress["best"]:
      return changes | {"best": value, "best_step": step, "worse": 0}
    changes["worse"] = progress["worse"] + 1
    changes["finished"] |= 0 < plan.patience <= changes["worse"]
  return changes
