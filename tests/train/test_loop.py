"""The training loop on a toy problem whose every parameter can be written down."""

import json
import os
import signal
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bbqrec_jax.interruption import Interrupted
from bbqrec_jax.train.checkpointing import Checkpointer
from bbqrec_jax.train.logging import MetricsLog
from bbqrec_jax.train.loop import Plan, fit
from bbqrec_jax.train.parallel import SingleDevice
from bbqrec_jax.train.state import TrainState, step_key

OPTIMIZER = optax.adam(0.1)


def make_batches():
  """Batch i holds the number i, four times."""
  return grain.MapDataset.range(1000).map(lambda index: np.full(4, index, np.float32)).to_iter_dataset()


def counting_step(state, shared, batch, *, axis_name):
  """w sums up the batches: after n steps it is 0 + 1 + ... + (n - 1)."""
  del axis_name
  total = state.params["w"] + shared * jnp.mean(batch)
  return state.replace(step=state.step + 1, params={"w": total}), {"loss": total, "half": 0.5 * total}


def noisy_step(state, shared, batch, *, axis_name):
  """Adam on a quadratic with noise of the step's own key: all of a state takes part."""
  del shared

  def loss_function(params):
    noise = jax.random.normal(step_key(state, axis_name), (4,))
    return jnp.mean(jnp.square(params["w"] - jnp.sin(batch) + noise))

  loss, gradients = jax.value_and_grad(loss_function)(state.params)
  updates, opt_state = OPTIMIZER.update(gradients, state.opt_state)
  params = optax.apply_updates(state.params, updates)
  return state.replace(step=state.step + 1, params=params, opt_state=opt_state), {"loss": loss}


class Toy:
  """One stage in a folder: run it, run it again, and look at what was called when."""

  def __init__(self, folder, *, step=counting_step, **changes):
    self.folder, self.step, self.evaluated, self.prepared = folder, step, [], []
    self.hook = lambda event, step: None
    self.values = {}
    self.changes = changes

  def evaluate(self, state):
    step = int(state.step)
    self.evaluated.append(step)
    self.hook("evaluate", step)
    return {"score": self.values.get(step, 0.0)}

  def before_step(self, step, state):
    assert step == int(state.step)
    self.prepared.append(step)
    self.hook("before_step", step)
    return state

  def fit(self):
    fields = {
      "name": "toy", "steps": 10, "log_every": 3, "evaluate_every": 4, "evaluate": self.evaluate,
      "before_step": self.before_step,
    }  # fmt: skip
    params = {"w": jnp.zeros(())}
    self.folder.mkdir(parents=True, exist_ok=True)
    log = MetricsLog(self.folder)
    try:
      return fit(
        Plan(**(fields | self.changes)),
        TrainState.create(params, OPTIMIZER, seed=3),
        jnp.ones(()),
        self.step,
        make_batches(),
        partitioner=SingleDevice(),
        directory=self.folder / "checkpoints",
        log=log,
      )
    finally:
      log.close()

  def records(self):
    return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def total(steps):
  return steps * (steps - 1) / 2


def test_the_last_state_is_returned_where_nothing_is_selected(tmp_path):
  toy = Toy(tmp_path)
  state, progress = toy.fit()
  assert float(state.params["w"]) == total(10)
  assert int(state.step) == 10
  assert progress["step"] == 10
  assert progress["finished"]
  assert toy.evaluated == [4, 8, 10]
  assert toy.prepared == list(range(10))


def test_metrics_are_logged_when_the_plan_says_so(tmp_path):
  toy = Toy(tmp_path)
  toy.values = {4: 0.25, 8: 0.5, 10: 0.125}
  toy.fit()
  records = toy.records()
  assert {record["stage"] for record in records} == {"toy"}
  train = {record["step"]: (record["loss"], record["half"]) for record in records if record["kind"] == "train"}
  assert train == {step: (total(step), total(step) / 2) for step in (3, 4, 6, 8, 9, 10)}
  validation = [(record["step"], record["score"]) for record in records if record["kind"] == "validation"]
  assert validation == [(4, 0.25), (8, 0.5), (10, 0.125)]


def test_the_best_state_by_the_selected_metric_is_returned(tmp_path):
  toy = Toy(tmp_path, select="score", evaluate_every=2)
  toy.values = {2: 0.1, 4: 0.5, 6: 0.3, 8: 0.4, 10: 0.2}
  state, progress = toy.fit()
  assert (progress["best_step"], progress["best"], progress["step"]) == (4, 0.5, 10)
  assert int(state.step) == 4
  assert float(state.params["w"]) == total(4)
  # And again from the finished run: nothing is trained or evaluated any more.
  again = Toy(tmp_path, select="score", evaluate_every=2)
  state, progress = again.fit()
  assert (again.evaluated, again.prepared) == ([], [])
  assert float(state.params["w"]) == total(4)
  assert progress["best_step"] == 4


@pytest.mark.parametrize("values", [{}, {2: 0.5, 4: 0.5, 6: 0.5}, {2: 0.1, 4: 0.5, 6: 0.5, 8: 0.5, 10: 0.2}])
def test_the_first_of_equally_good_states_is_returned(tmp_path, values):
  toy = Toy(tmp_path, select="score", evaluate_every=2)
  toy.values = values
  state, progress = toy.fit()
  best = max(values, key=values.get) if values else 2
  assert progress["best_step"] == best
  assert float(state.params["w"]) == total(best)


def test_patience_stops(tmp_path):
  toy = Toy(tmp_path, select="score", evaluate_every=1, patience=3)
  toy.values = {1: 0.1, 2: 0.0, 3: 0.4, 4: 0.3, 5: 0.2, 6: 0.4, 7: 0.9}
  state, progress = toy.fit()
  # Step 6 equals the best and is not better: the third in a row.
  assert toy.evaluated == [1, 2, 3, 4, 5, 6]
  assert (progress["best_step"], progress["step"], progress["worse"]) == (3, 6, 3)
  assert progress["finished"]
  assert float(state.params["w"]) == total(3)


def test_no_patience_never_stops(tmp_path):
  toy = Toy(tmp_path, select="score", evaluate_every=1, patience=0)
  toy.values = {1: 0.1}
  _, progress = toy.fit()
  assert progress["step"] == 10
  assert progress["best_step"] == 1


def test_before_step_may_change_the_state(tmp_path):
  toy = Toy(tmp_path)

  def add_thousand(step, state):
    toy.prepared.append(step)
    return state.replace(params={"w": state.params["w"] + 1000.0}) if step == 5 else state

  toy.changes = {"before_step": add_thousand}
  state, _ = toy.fit()
  assert toy.prepared == list(range(10))
  assert float(state.params["w"]) == 1000.0 + total(10)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_stops_the_run(tmp_path, value):
  def breaks(state, shared, batch, *, axis_name):
    state, metrics = counting_step(state, shared, batch, axis_name=axis_name)
    return state, metrics | {"half": jnp.where(state.step >= 5, value, metrics["half"])}

  toy = Toy(tmp_path, step=breaks)
  # Looked at after step 6, and the step that broke is named.
  with pytest.raises(FloatingPointError, match=rf"^toy: half is {value} at step 5; "):
    toy.fit()
  assert toy.evaluated == [4]
  assert [record["step"] for record in toy.records() if record["kind"] == "train"] == [3, 4]


def test_the_terms_that_broke_are_named_and_not_what_follows_from_them(tmp_path):
  def breaks(state, shared, batch, *, axis_name):
    state, metrics = counting_step(state, shared, batch, axis_name=axis_name)
    bad = jnp.where(state.step >= 2, jnp.nan, 1.0)
    return state, {"loss": bad, "fine": metrics["half"], "contrast": bad, "club": -bad, "gradient_norm": bad}

  with pytest.raises(FloatingPointError, match=r"^toy: club is nan, contrast is nan at step 2; "):
    Toy(tmp_path / "terms", step=breaks).fit()

  def overflows(state, shared, batch, *, axis_name):
    state, metrics = counting_step(state, shared, batch, axis_name=axis_name)
    return state, metrics | {"gradient_norm": jnp.where(state.step >= 2, jnp.inf, 1.0)}

  with pytest.raises(FloatingPointError, match=r"^toy: gradient_norm is inf at step 2; "):
    Toy(tmp_path / "norm", step=overflows).fit()


def interrupt_at(event, step, signum=signal.SIGTERM):
  def hook(happening, at):
    if (happening, at) == (event, step):
      os.kill(os.getpid(), signum)

  return hook


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
  ("event", "at", "saved"), [("before_step", 0, 1), ("before_step", 5, 6), ("evaluate", 4, 4), ("before_step", 7, 8)]
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path, event, at, saved, signum):
  settings = {"step": noisy_step, "select": "score"}
  scores = {4: 0.3, 8: 0.9, 10: 0.1}
  straight = Toy(tmp_path / "straight", **settings)
  straight.values = scores
  expected, expected_progress = straight.fit()

  first = Toy(tmp_path / "cut", **settings)
  first.values, first.hook = scores, interrupt_at(event, at, signum)
  handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
  with pytest.raises(Interrupted) as stop:
    first.fit()
  assert stop.value.signum == signum
  assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
  assert str(saved) in {path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()}

  second = Toy(tmp_path / "cut", **settings)
  second.values = scores
  state, progress = second.fit()
  assert second.prepared == list(range(saved, 10)), "the run goes on with the step after the one that was saved"
  assert first.evaluated + second.evaluated == [4, 8, 10]
  assert jax.tree.structure(state) == jax.tree.structure(expected)
  for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
    if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
      one, other = jax.random.key_data(one), jax.random.key_data(other)
    np.testing.assert_array_equal(one, other)
  for name in ("step", "best_step", "best", "worse", "finished"):
    assert progress[name] == expected_progress[name], name
  assert progress["best_step"] == 8
  seconds = ("training_seconds", "evaluation_seconds")
  assert all(progress[name] > 0.0 for name in seconds)


def test_an_interruption_on_the_last_step_loses_nothing(tmp_path):
  toy = Toy(tmp_path)
  toy.hook = interrupt_at("evaluate", 10)
  with pytest.raises(Interrupted):
    toy.fit()
  again = Toy(tmp_path)
  state, progress = again.fit()
  assert (again.evaluated, again.prepared) == ([], [])
  assert progress["finished"]
  assert float(state.params["w"]) == total(10)


def test_a_checkpoint_holds_what_it_was_given_even_if_that_moves_on(tmp_path, monkeypatch):
  # The file is written in the background; a slow disk must not let later changes into it.
  written = json.dumps

  def slow(value, *args, **kwargs):
    time.sleep(0.2)
    return written(value, *args, **kwargs)

  data = iter(make_batches())
  checkpointer = Checkpointer(tmp_path / "checkpoints")
  progress = {"step": 1, "best_step": -1}
  state = {"w": jnp.ones(3)}
  monkeypatch.setattr(json, "dumps", slow)
  checkpointer.save(1, state, data, progress)
  progress["step"] = 2
  next(data)
  checkpointer.close()
  monkeypatch.undo()
  fresh = iter(make_batches())
  checkpointer = Checkpointer(tmp_path / "checkpoints")
  restored, saved_progress = checkpointer.restore_latest(state, fresh)
  checkpointer.close()
  assert saved_progress == {"step": 1, "best_step": -1}
  np.testing.assert_array_equal(restored["w"], np.ones(3))
  np.testing.assert_array_equal(next(fresh), np.zeros(4))


def test_only_the_latest_and_the_best_checkpoint_are_kept(tmp_path):
  toy = Toy(tmp_path, select="score", evaluate_every=1)
  toy.values = {3: 0.9, 7: 0.5}
  toy.fit()
  assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"3", "10"}
