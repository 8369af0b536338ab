"""The training loop that both stages share."""

import dataclasses
import math
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grain
import jax

from bbqrec_jax.interruption import Interrupted
from bbqrec_jax.train.checkpointing import Checkpointer
from bbqrec_jax.train.logging import MetricsLog, Progress, say
from bbqrec_jax.train.parallel import Partitioner, StepFunction
from bbqrec_jax.train.state import TrainState


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
  """Collects SIGTERM and SIGINT instead of dying of them; the second Ctrl-C is not caught."""
  caught: list[int] = []

  def note(signum, _frame):
    caught.append(signum)
    signal.signal(signal.SIGINT, signal.default_int_handler)

  previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield caught
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


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
    before_step: (step, state) -> state, run before that step; for what happens once, on the host.
  """

  name: str
  steps: int
  log_every: int
  evaluate_every: int
  evaluate: Callable[[TrainState], dict[str, float]]
  select: str | None = None
  patience: int = 0
  before_step: Callable[[int, TrainState], TrainState] = lambda step, state: state


def fit(
  plan: Plan,
  state: TrainState,
  shared: Any,
  step_function: StepFunction,
  batches: grain.IterDataset,
  *,
  partitioner: Partitioner,
  directory: pathlib.Path,
  log: MetricsLog,
) -> tuple[TrainState, dict[str, Any]]:
  """Trains from the last checkpoint in `directory`, or from `state`, to the end of the plan.

  The order of a turn is: step, training metrics, evaluation, checkpoint. A checkpoint so holds all that came of its
  step, and the run goes on from it with the next batch as if it had never stopped.

  Args:
    plan: the stage.
    state: the first state.
    shared: data that every step is given.
    step_function: see `train.parallel`.
    batches: the input pipeline.
    partitioner: how steps meet devices.
    directory: for checkpoints.
    log: for metrics.

  Returns:
    The best state by `plan.select` (or the last), and the progress record: `step`, `best_step`, `best`, `worse`,
    `finished`, `training_seconds` and `evaluation_seconds`, all of them over every start of the run.

  Raises:
    Interrupted: after a signal, once a checkpoint is written.
    FloatingPointError: if a training metric is not finite; names stage, step and term.
  """
  state = partitioner.replicate(state)
  shared = partitioner.replicate(shared)
  data = iter(batches)
  checkpointer = Checkpointer(directory)
  progress: dict[str, Any] = {
    "step": 0, "best_step": -1, "best": -math.inf, "worse": 0, "finished": False,
    "training_seconds": 0.0, "evaluation_seconds": 0.0,
  }  # fmt: skip
  restored = checkpointer.restore_latest(state, data)
  if restored is not None:
    state, progress = restored
    if not progress["finished"]:
      say(f"{plan.name}: going on from step {progress['step']}")
  step = partitioner.compile_step(step_function)
  clock = time.monotonic()

  def spent() -> float:
    """Seconds since the last call."""
    nonlocal clock
    before, clock = clock, time.monotonic()
    return clock - before

  recent: list[Any] = []  # Metrics of the steps since they were last looked at.
  bar = Progress(plan.name, total=plan.steps, done=progress["step"])
  with _caught_signals() as caught:
    try:
      while not progress["finished"]:
        state = plan.before_step(progress["step"], state)
        state, metrics = step(state, shared, next(data))
        progress["step"] += 1
        recent.append(metrics)
        bar.advance()
        done = progress["step"] >= plan.steps
        evaluating = progress["step"] % plan.evaluate_every == 0 or done
        # Looked at before every checkpoint: none is ever written of a state that has diverged.
        if progress["step"] % plan.log_every == 0 or evaluating or caught:
          _log_training(plan.name, progress["step"], recent, log, bar)
          recent.clear()
        if evaluating:
          progress["training_seconds"] += spent()
          values = plan.evaluate(state)
          progress["evaluation_seconds"] += spent()
          log.write(plan.name, "validation", progress["step"], values)
          progress = _judge(plan, progress, values, done)
          checkpointer.save(progress["step"], state, data, progress)
        if caught:
          progress["training_seconds"] += spent()
          checkpointer.save(progress["step"], state, data, progress)
          raise Interrupted(caught[0])
      if plan.select is not None and progress["best_step"] != progress["step"]:
        state = checkpointer.restore_state(progress["best_step"], state)
    finally:
      bar.close()
      checkpointer.close()
      data.close()
  return state, progress


def _log_training(name: str, step: int, recent: list[Any], log: MetricsLog, bar: Progress) -> None:
  """Logs the metrics of `step`, the last of `recent`, once all of those are known to be finite."""
  looked_at = [{key: float(value) for key, value in metrics.items()} for metrics in jax.device_get(recent)]
  for number, values in enumerate(looked_at, start=step - len(recent) + 1):
    broken = [term for term, value in values.items() if not math.isfinite(value)]
    if broken:
      # The terms that broke, not the sums and norms that follow from them, where there are such.
      terms = [term for term in broken if term not in ("loss", "gradient_norm")] or broken
      found = ", ".join(f"{term} is {values[term]}" for term in terms)
      raise FloatingPointError(f"{name}: {found} at step {number}; lower the learning rate or the clip norm")
  log.write(name, "train", step, looked_at[-1])
  bar.report({"loss": looked_at[-1]["loss"]})


def _judge(plan: Plan, progress: dict[str, Any], values: dict[str, float], done: bool) -> dict[str, Any]:
  """Updates the record of the best model after an evaluation."""
  progress = dict(progress)
  if plan.select is not None:
    value = values[plan.select]
    say(f"{plan.name} {progress['step']}/{plan.steps}  validation {plan.select} {value:.4f}")
    if value > progress["best"]:
      progress |= {"best": value, "best_step": progress["step"], "worse": 0}
    else:
      progress["worse"] += 1
    done = done or (plan.patience > 0 and progress["worse"] >= plan.patience)
  return progress | {"finished": done}
