"""The training loop on a toy problem whose every parameter can be written down."""

import asyncio
import functools
import gc
import itertools
import json
import os
import shutil
import signal
import sys
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bbqrec_jax.errors import Diverged, InputError, StorageError
from bbqrec_jax.training import checkpointing
from bbqrec_jax.training.checkpointing import Checkpointer, damage, restore_state
from bbqrec_jax.training.logging import MetricsLog
from bbqrec_jax.training.loop import Plan, compiled_step, fit
from bbqrec_jax.training.partitioning import Pmap, SingleDevice
from bbqrec_jax.training.settings import Safeguards
from bbqrec_jax.training.state import TrainState, step_key
from bbqrec_jax.training.step import skip_nonfinite
from bbqrec_jax.utils.signals import Interrupted

OPTIMIZER = optax.adam(0.1)


def make_batches():
  """Batch i holds item i, four times."""
  return grain.MapDataset.range(1000).map(lambda index: {"items": np.full(4, index, np.int32)}).to_iter_dataset()


def counting_step(state, shared, batch, *, axis_name):
  """w sums up the batches: after n steps it is 0 + 1 + ... + (n - 1)."""
  del axis_name
  total = state.params["w"] + shared * jnp.mean(batch["items"])
  return state.replace(step=state.step + 1, params={"w": total}), {"loss": total, "half": 0.5 * total}


def noisy_step(state, shared, batch, *, axis_name):
  """Adam on a quadratic with noise of the step's own key: all of a state takes part."""
  del shared

  def loss_function(params):
    noise = jax.random.normal(step_key(state, axis_name), (4,))
    return jnp.mean(jnp.square(params["w"] - jnp.sin(batch["items"]) + noise))

  loss, gradients = jax.value_and_grad(loss_function)(state.params)
  updates, opt_state = OPTIMIZER.update(gradients, state.opt_state)
  params = optax.apply_updates(state.params, updates)
  return state.replace(step=state.step + 1, params=params, opt_state=opt_state), {"loss": loss}


class Hooked(SingleDevice):
  """Calls a hook before each step, as if something happened while it is underway."""

  def __init__(self, hook):
    self.hook = hook

  def compile_step(self, step):
    compiled = super().compile_step(step)

    def hooked(state, shared, batch):
      self.hook("step", int(state.step))
      return compiled(state, shared, batch)

    return hooked


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

  def before(self, step, state):
    assert step == int(state.step)
    self.prepared.append(step)
    self.hook("before", step)
    return state

  def first_state(self):
    return TrainState.create({"w": jnp.zeros(())}, OPTIMIZER, seed=3)

  def fit(self):
    fields = {
      "name": "toy", "steps": 10, "log_every": 3, "evaluate_every": 4, "evaluate": self.evaluate,
      "before": {step: functools.partial(self.before, step) for step in range(10)},
    }  # fmt: skip
    self.folder.mkdir(parents=True, exist_ok=True)
    log, partitioner, plan = MetricsLog(self.folder), Hooked(self.hook), Plan(**(fields | self.changes))
    try:
      return fit(
        plan,
        partitioner.place(self.first_state()),
        jnp.ones(()),
        compiled_step(self.step, plan.safeguards, partitioner),
        make_batches(),
        partitioner=partitioner,
        directory=self.folder / "checkpoints",
        log=log,
      )
    finally:
      log.close()

  def records(self):
    return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def without_times(records):
  return [{name: value for name, value in record.items() if name != "time"} for record in records]


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


def test_the_state_may_be_changed_before_a_step(tmp_path):
  toy = Toy(tmp_path)

  def add_thousand(state):
    toy.prepared.append(int(state.step))
    return state.replace(params={"w": state.params["w"] + 1000.0})

  toy.changes = {"before": {5: add_thousand}}
  state, _ = toy.fit()
  assert toy.prepared == [5]
  assert float(state.params["w"]) == 1000.0 + total(10)


@pytest.mark.parametrize("steps_per_call", [2, 3, 4, 50])
@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_steps_of_one_call_are_the_same_steps(tmp_path, steps_per_call, on_nonfinite):
  changes = {
    "step": noisy_step, "select": "score", "steps": 23, "log_every": 7, "evaluate_every": 12,
    "safeguards": Safeguards(on_nonfinite=on_nonfinite),
  }  # fmt: skip
  results = []
  for name, count in (("one", 1), ("several", steps_per_call)):
    toy, calls = Toy(tmp_path / name, steps_per_call=count, **changes), []
    toy.changes["before"] = {10: lambda state: state.replace(params={"w": state.params["w"] + 100.0})}
    toy.values = {12: 0.3, 23: 0.9}
    toy.hook = lambda event, step, calls=calls: calls.append(step) if event == "step" else None
    state, progress = toy.fit()
    plan = {"step": progress["step"], "losses": progress["losses"], "best_step": progress["best_step"]}
    results.append((without_times(toy.records()), plan, state.replace(key=jax.random.key_data(state.key))))
  (records, plan, state), (others, other_plan, other) = results
  assert others == records
  assert other_plan == plan
  for leaf, same in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(leaf, same)
  # What is due at 7, 10, 12, 14, 21 and 23 ends a call; what is left before it goes step by step.
  starts = {
    2: [0, 2, 4, 6, 7, 9, 10, 12, 14, 16, 18, 20, 21],
    3: [0, 3, 6, 7, 10, 11, 12, 13, 14, 17, 20, 21, 22],
    4: [0, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 18, 19, 20, 21, 22],
    50: list(range(23)),
  }
  assert calls == starts[steps_per_call]


def test_a_signal_amid_a_call_stops_after_it_and_the_run_goes_on_to_the_same(tmp_path):
  changes = {"step": noisy_step, "select": "score", "before": {}}
  expected, _ = Toy(tmp_path / "straight", **changes).fit()
  cut = Toy(tmp_path / "cut", steps_per_call=2, log_every=10, **changes)
  cut.hook = interrupt_at("step", 2)
  with pytest.raises(Interrupted):
    cut.fit()
  assert checkpoints(tmp_path / "cut") == {"4"}
  state, _ = Toy(tmp_path / "cut", steps_per_call=3, log_every=10, **changes).fit()
  np.testing.assert_array_equal(state.params["w"], expected.params["w"])


def test_the_step_of_a_call_that_is_not_finite_is_named(tmp_path):
  def breaks(state, shared, batch, *, axis_name):
    state, metrics = counting_step(state, shared, batch, axis_name=axis_name)
    return state, metrics | {"half": jnp.where(state.step == 5, jnp.nan, metrics["half"])}

  toy = Toy(tmp_path, step=breaks, steps_per_call=4, log_every=8, evaluate_every=8, before={})
  with pytest.raises(Diverged, match=r"^toy: half is nan at step 5, whose batch \(number 4\) holds items 4; "):
    toy.fit()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_stops_the_run(tmp_path, value):
  def breaks(state, shared, batch, *, axis_name):
    state, metrics = counting_step(state, shared, batch, axis_name=axis_name)
    return state, metrics | {"half": jnp.where(state.step >= 5, value, metrics["half"])}

  toy = Toy(tmp_path, step=breaks)
  # Looked at after step 6, and the step that broke is named.
  with pytest.raises(Diverged, match=rf"^toy: half is {value} at step 5, whose batch \(number 4\) holds items 4; "):
    toy.fit()
  assert toy.evaluated == [4]
  assert [(record["kind"], record["step"]) for record in toy.records()] == [
    ("train", 3), ("train", 4), ("validation", 4), ("diverged", 5),
  ]  # fmt: skip
  record = toy.records()[-1]
  assert (record["terms"], record["batch"], record["items"]) == ({"half": str(value)}, 4, [4])
  assert float(restore_state(tmp_path / "checkpoints", 4, toy.first_state()).params["w"]) == total(4)


def test_the_terms_that_broke_are_named_and_not_what_follows_from_them(tmp_path):
  def breaks(state, shared, batch, *, axis_name):
    state, metrics = counting_step(state, shared, batch, axis_name=axis_name)
    bad = jnp.where(state.step >= 2, jnp.nan, 1.0)
    return state, {"loss": bad, "fine": metrics["half"], "contrast": bad, "club": -bad, "gradient_norm": bad}

  with pytest.raises(Diverged, match=r"^toy: club is nan, contrast is nan at step 2, "):
    Toy(tmp_path / "terms", step=breaks).fit()

  def overflows(state, shared, batch, *, axis_name):
    state, metrics = counting_step(state, shared, batch, axis_name=axis_name)
    return state, metrics | {"gradient_norm": jnp.where(state.step >= 2, jnp.inf, 1.0)}

  with pytest.raises(Diverged, match=r"^toy: gradient_norm is inf at step 2, "):
    Toy(tmp_path / "norm", step=overflows).fit()


def interrupt_at(event, step, signum=signal.SIGTERM):
  def hook(happening, at):
    if (happening, at) == (event, step):
      os.kill(os.getpid(), signum)

  return hook


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
  ("event", "at", "saved"),
  [("before", 0, 0), ("step", 0, 1), ("before", 5, 5), ("step", 5, 6), ("evaluate", 4, 4), ("step", 7, 8)],
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
  assert max((int(path.name) for path in (tmp_path / "cut" / "checkpoints").iterdir()), default=0) == saved

  second = Toy(tmp_path / "cut", **settings)
  second.values = scores
  state, progress = second.fit()
  assert second.prepared == list(range(saved, 10)), "the run goes on with the step after the one that was saved"
  # An evaluation that is interrupted is given up, and done by the run that goes on.
  assert first.evaluated + second.evaluated == ([4, 4, 8, 10] if event == "evaluate" else [4, 8, 10])
  assert without_times(second.records()) == without_times(straight.records())
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
  assert (again.evaluated, again.prepared) == ([10], [])
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
  progress = {"step": 2, "best_step": -1}
  state = {"w": jnp.ones(3)}
  checkpointer.save(1, state, data, {"step": 1, "best_step": -1})  # The first one is waited for.
  monkeypatch.setattr(json, "dumps", slow)
  checkpointer.save(2, state, data, progress)
  progress["step"] = 3
  next(data)
  checkpointer.close()
  monkeypatch.undo()
  fresh = iter(make_batches())
  checkpointer = Checkpointer(tmp_path / "checkpoints")
  restored, saved_progress = checkpointer.restore_latest(state, fresh)
  checkpointer.close()
  assert saved_progress == {"step": 2, "best_step": -1}
  np.testing.assert_array_equal(restored["w"], np.ones(3))
  np.testing.assert_array_equal(next(fresh)["items"], np.zeros(4))


def checkpoints(folder):
  return {path.name for path in (folder / "checkpoints").iterdir()}


@pytest.mark.parametrize(("keep", "kept"), [(1, {"3", "10"}), (2, {"3", "9", "10"}), (4, {"3", "7", "8", "9", "10"})])
def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path, keep, kept):
  toy = Toy(tmp_path, select="score", evaluate_every=1, safeguards=Safeguards(keep_checkpoints=keep))
  toy.values = {3: 0.9, 7: 0.5}
  toy.fit()
  assert checkpoints(tmp_path) == kept


def flip(path, place=0.5, bit=3):
  """Flips one bit of a file."""
  content = bytearray(path.read_bytes())
  content[int(place * len(content))] ^= 1 << bit
  path.write_bytes(content)


def largest(folder):
  return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGES = {
  "flipped": lambda folder: flip(largest(folder / "state")),
  "cut off": lambda folder: os.truncate(largest(folder / "state"), 10),
  "missing": lambda folder: largest(folder / "state").unlink(),
  "other progress": lambda folder: flip(folder / "progress" / "metadata"),
  "no digests": lambda folder: (folder / "digests.json").unlink(),
  "other digests": lambda folder: flip(folder / "digests.json"),
  "half deleted": lambda folder: shutil.rmtree(folder / "state"),
  "empty": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


@pytest.fixture(scope="module")
def straight_and_cut(tmp_path_factory):
  """A run of noisy steps to its end, its last state, and the folder of one that was cut after step 9."""
  folder = tmp_path_factory.mktemp("runs")
  straight = Toy(folder / "straight", step=noisy_step)
  expected, _ = straight.fit()
  cut = Toy(folder / "cut", step=noisy_step)
  cut.hook = interrupt_at("step", 8)
  with pytest.raises(Interrupted):
    cut.fit()
  assert checkpoints(folder / "cut") == {"8", "9"}
  return straight, expected, folder / "cut"


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(straight_and_cut, tmp_path, capsys, kind):
  straight, expected, cut = straight_and_cut
  shutil.copytree(cut, tmp_path / "cut")
  DAMAGES[kind](tmp_path / "cut" / "checkpoints" / "9")
  second = Toy(tmp_path / "cut", step=noisy_step)
  state, _ = second.fit()
  assert second.prepared == [8, 9]
  said = capsys.readouterr().out
  assert "warning: checkpoint 9 is passed over, and is now" in said
  assert f"{tmp_path}/cut/checkpoints/9/" in said, "the damaged file is named"
  assert "toy: going on from step 8" in said
  assert checkpoints(tmp_path / "cut") == {"8", "9.set_aside", "10"}
  np.testing.assert_array_equal(state.params["w"], expected.params["w"])
  assert without_times(second.records()) == without_times(straight.records())


def test_a_checkpoint_whose_best_is_damaged_is_passed_over_too(tmp_path, capsys):
  def toy(folder):
    made = Toy(tmp_path / folder, step=noisy_step, select="score", evaluate_every=2)
    made.values = {2: 0.5, 4: 0.1, 6: 0.9}
    return made

  expected, _ = toy("straight").fit()
  first = toy("cut")
  first.hook = interrupt_at("step", 6)
  with pytest.raises(Interrupted):
    first.fit()
  # 7 calls 6 the best, which is kept for it; 6 calls itself so, and 4, which would need 2, is not kept any more.
  assert checkpoints(tmp_path / "cut") == {"6", "7"}
  DAMAGES["flipped"](tmp_path / "cut" / "checkpoints" / "6")
  second = toy("cut")
  state, progress = second.fit()
  assert second.prepared == list(range(10)), "nothing that is left can be gone on from"
  said = capsys.readouterr().out
  assert "checkpoint 7 is passed over" in said
  assert "the best one by then, 6, cannot be used" in said
  assert progress["best_step"] == 6
  np.testing.assert_array_equal(state.params["w"], expected.params["w"])


def test_the_best_of_the_checkpoint_before_the_last_is_kept_for_it(tmp_path):
  toy = Toy(tmp_path, step=noisy_step, select="score", evaluate_every=2)
  toy.values = {2: 0.5, 4: 0.1, 6: 0.9}
  toy.hook = interrupt_at("before", 6)
  with pytest.raises(Interrupted):
    toy.fit()
  assert checkpoints(tmp_path) == {"2", "4", "6"}
  DAMAGES["flipped"](tmp_path / "checkpoints" / "6")
  again = Toy(tmp_path, step=noisy_step, select="score", evaluate_every=2)
  again.values = {2: 0.5, 4: 0.1, 6: 0.2}
  _, progress = again.fit()
  assert again.prepared == list(range(4, 10))
  assert progress["best_step"] == 2


def test_every_file_of_a_checkpoint_but_that_of_its_times_is_guarded(tmp_path):
  Toy(tmp_path, steps=1).fit()
  folder = tmp_path / "checkpoints" / "1"
  assert damage(folder) == ""
  files = [path for path in folder.rglob("*") if path.is_file() and path.name != "_CHECKPOINT_METADATA"]
  assert len(files) > 10
  for path, kind in itertools.product(files, ("flipped", "cut off", "missing")):
    whole = path.read_bytes()
    if kind == "flipped" and whole:
      flip(path, place=len(whole) % 7 / 7, bit=len(whole) % 8)
    elif kind == "cut off" and whole:
      path.write_bytes(whole[: len(whole) // 2])
    else:
      path.unlink()
    # What orbax writes last says that all is there, and nothing else.
    if path != folder / "commit_success.txt":
      assert str(path) in damage(folder), (path, kind)
    path.write_bytes(whole)
  assert damage(folder) == ""


def test_a_damaged_best_checkpoint_is_refused_by_whoever_only_reads(tmp_path):
  toy = Toy(tmp_path, steps=1)
  toy.fit()
  DAMAGES["cut off"](tmp_path / "checkpoints" / "1")
  with pytest.raises(
    InputError, match=r"checkpoints/1/state/.* was changed or cut off .*: checkpoint 1 cannot be used"
  ):
    restore_state(tmp_path / "checkpoints", 1, toy.first_state())
  with pytest.raises(InputError, match=r"checkpoints/7/digests\.json is missing: checkpoint 7 cannot be used"):
    restore_state(tmp_path / "checkpoints", 7, toy.first_state())


def test_a_disk_that_takes_no_more_is_one_error_and_the_run_goes_on_later(straight_and_cut, tmp_path, monkeypatch):
  _, expected, _ = straight_and_cut
  written = checkpointing._write_digests

  def full(folder):
    if folder.name.startswith("8"):
      raise OSError(28, "No space left on device")
    written(folder)

  monkeypatch.setattr(checkpointing, "_write_digests", full)
  with pytest.raises(StorageError, match=r"could not write checkpoint 8: No space left on device; mend that"):
    Toy(tmp_path, step=noisy_step).fit()
  monkeypatch.undo()
  again = Toy(tmp_path, step=noisy_step)
  state, _ = again.fit()
  assert again.prepared[0] == 4
  np.testing.assert_array_equal(state.params["w"], expected.params["w"])
  assert checkpoints(tmp_path) == {"8", "10"}, "what the failed save left is gone"


# Threads of tensorstore answer an event loop that orbax has closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("lost", ["state/manifest.ocdbt", "state/d/*", "state"])
def test_a_checkpoint_that_cannot_be_read_back_ends_the_run_at_once(
  straight_and_cut, tmp_path, monkeypatch, capsys, lost
):
  _, expected, _ = straight_and_cut
  written = checkpointing._write_digests

  def without(folder):
    for path in folder.glob(lost):
      shutil.rmtree(path) if path.is_dir() else path.unlink()
    written(folder)

  monkeypatch.setattr(checkpointing, "_write_digests", without)
  toy = Toy(tmp_path, step=noisy_step)
  with pytest.raises(
    StorageError, match=r"checkpoints/4 was written and cannot be read back .*; use another --workdir"
  ):
    toy.fit()
  assert toy.evaluated == [4]
  monkeypatch.undo()
  again = Toy(tmp_path, step=noisy_step)
  state, _ = again.fit()
  assert "warning: checkpoint 4 is passed over" in capsys.readouterr().out
  assert again.prepared[0] == 0
  np.testing.assert_array_equal(state.params["w"], expected.params["w"])


def test_the_best_is_read_back_before_the_run_is_done_even_if_it_is_the_last(tmp_path, monkeypatch):
  wait = Checkpointer.wait

  def wait_and_lose(self):
    wait(self)
    if (tmp_path / "checkpoints" / "10").exists():
      DAMAGES["cut off"](tmp_path / "checkpoints" / "10")

  toy = Toy(tmp_path, select="score")
  toy.values = {10: 1.0}
  monkeypatch.setattr(Checkpointer, "wait", wait_and_lose)
  with pytest.raises(InputError, match=r"checkpoints/10/state/.* was changed or cut off"):
    toy.fit()


# What orbax and tensorstore would take for patterns, buckets and other separators, and what cannot be printed.
ODD = ["[a]", "a*", "a?", "**", "logs:", "a\\b", "a\nb\x1b\u2028", "\udcff", "e\u0301 '\"%20#$|. "]


def test_checkpoints_are_kept_in_folders_of_any_name(tmp_path, straight_and_cut):
  _, expected, _ = straight_and_cut
  folder = tmp_path.joinpath(*ODD)
  first = Toy(folder, step=noisy_step)
  first.hook = interrupt_at("step", 5)
  with pytest.raises(Interrupted):
    first.fit()
  state, _ = Toy(folder, step=noisy_step).fit()
  np.testing.assert_array_equal(state.params["w"], expected.params["w"])
  restored = restore_state(folder / "checkpoints", 10, Toy(folder).first_state())
  np.testing.assert_array_equal(restored.params["w"], expected.params["w"])


@pytest.mark.parametrize("name", ODD)
def test_a_checkpoint_in_a_folder_of_an_odd_name_is_its_own(tmp_path, name):
  for folder, value in ((tmp_path / "ab", 1.0), (tmp_path / "a", 2.0), (tmp_path / name, 3.0)):
    checkpointer = Checkpointer(folder)
    checkpointer.save(1, {"w": jnp.full(2, value)}, iter(make_batches()), {"best_step": -1})
    checkpointer.close()
  assert restore_state(tmp_path / name, 1, {"w": jnp.ones(2)})["w"].tolist() == [3.0, 3.0]
  assert sorted(os.listdir(tmp_path)) == sorted(["ab", "a", name])


def test_a_save_that_fails_ends_what_it_has_begun(monkeypatch):
  told, ended = [], []
  monkeypatch.setattr(sys, "unraisablehook", told.append)

  async def writes(seconds):
    await asyncio.sleep(seconds)
    if not seconds:
      raise OSError("disk full")
    ended.append(seconds)
    raise OSError("disk full still")

  async def save():
    await asyncio.gather(writes(0), *(writes(seconds) for seconds in (0.01, 0.02)))

  with checkpointing._finishing_loops():
    loop = asyncio.new_event_loop()
  loop.set_exception_handler(lambda loop, context: told.append(context))
  with pytest.raises(OSError, match=r"full$"):
    loop.run_until_complete(save())
  assert not ended
  loop.close()
  loop.close()
  gc.collect()
  assert (ended, told) == ([0.01, 0.02], [])
  assert loop.is_closed()
  other = asyncio.new_event_loop()
  other.close()
  assert type(other) is not type(loop)


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
  def overflows(state, shared, batch, *, axis_name):
    state, metrics = counting_step(state, shared, batch, axis_name=axis_name)
    return state.replace(params={"w": jnp.where(state.step == 8, jnp.inf, state.params["w"])}), metrics

  with pytest.raises(Diverged, match=r"^toy: .*params\['w'\] is not finite after step 8; what was saved before"):
    Toy(tmp_path, step=overflows).fit()
  assert checkpoints(tmp_path) == {"4"}


def bad_at(*steps):
  """`counting_step` whose loss is not a number at some steps, which would spoil the state."""

  def step(state, shared, batch, *, axis_name):
    bad = jnp.isin(state.step + 1, jnp.array(steps))
    state, metrics = counting_step(state, shared, batch, axis_name=axis_name)
    state = state.replace(params={"w": jnp.where(bad, jnp.nan, state.params["w"])})
    return state, metrics | {"loss": jnp.where(bad, jnp.nan, 1.0)}

  return step


def test_steps_that_are_not_finite_are_skipped_and_counted_where_the_run_says_so(tmp_path):
  toy = Toy(tmp_path, step=bad_at(3, 6, 7), safeguards=Safeguards(on_nonfinite="skip", max_skipped=3))
  state, progress = toy.fit()
  assert float(state.params["w"]) == total(10) - (2 + 5 + 6)
  assert int(state.step) == progress["step"] == 10
  assert (progress["skipped"], progress["skipped_in_a_row"]) == (3, 0)
  kinds = {kind: [r["step"] for r in toy.records() if r["kind"] == kind] for kind in ("skipped", "train")}
  # The metrics of a step that was skipped are no metrics.
  assert kinds == {"skipped": [3, 6, 7], "train": [2, 4, 5, 8, 9, 10]}
  assert [r["items"] for r in toy.records() if r["kind"] == "skipped"] == [[2], [5], [6]]


def test_too_many_skipped_steps_in_a_row_stop_the_run_wherever_it_was_cut(tmp_path):
  safeguards = Safeguards(on_nonfinite="skip", max_skipped=3)
  first = Toy(tmp_path, step=bad_at(2, 5, 6, 7), safeguards=safeguards)
  first.hook = interrupt_at("step", 5)
  with pytest.raises(Interrupted):
    first.fit()
  with pytest.raises(
    Diverged, match=r"^toy: loss is nan at step 7, .*; so have been 3 steps in a row, and none of them"
  ):
    Toy(tmp_path, step=bad_at(2, 5, 6, 7), safeguards=safeguards).fit()
  assert checkpoints(tmp_path) == {"4", "6"}


def test_a_run_that_diverged_goes_on_with_skipping(tmp_path):
  with pytest.raises(Diverged):
    Toy(tmp_path, step=bad_at(6)).fit()
  state, _ = Toy(tmp_path, step=bad_at(6), safeguards=Safeguards(on_nonfinite="skip")).fit()
  assert float(state.params["w"]) == total(10) - 5


def test_every_device_skips_what_one_cannot_use():
  def step(state, shared, batch, *, axis_name):
    total = jax.lax.psum(jnp.sum(batch), axis_name)
    return state.replace(step=state.step + 1, params={"w": state.params["w"] + total}), {"loss": total}

  partitioner = Pmap()
  compiled = partitioner.compile_step(skip_nonfinite(step))
  state = partitioner.place(TrainState.create({"w": jnp.zeros(())}, OPTIMIZER, seed=0))
  batch = np.ones(2 * partitioner.num_devices, np.float32)
  for values, expected in ((batch, len(batch)), (np.append(batch[1:], np.inf), len(batch)), (batch, 2 * len(batch))):
    state, metrics = compiled(state, None, values)
    assert np.isfinite(metrics["loss"]) == np.isfinite(values).all()
    assert [float(shard.data) for shard in state.params["w"].addressable_shards] == [expected] * partitioner.num_devices
  assert int(state.step) == 3


def test_spikes_of_the_loss_are_logged_wherever_the_run_was_cut(tmp_path, capsys):
  def spiky(state, shared, batch, *, axis_name):
    state, metrics = counting_step(state, shared, batch, axis_name=axis_name)
    loss = jnp.where(jnp.isin(state.step, jnp.array([5, 30, 31])), 7.0, 2.0)
    return state, metrics | {"loss": jnp.where(state.step == 33, 5.0, loss)}

  settings = {"step": spiky, "steps": 40, "evaluate_every": 20}
  straight = Toy(tmp_path / "straight", **settings)
  straight.fit()
  # Step 5 has too few before it, and 33 is less than three times as high.
  spikes = [(r["step"], r["loss"], r["median"]) for r in straight.records() if r["kind"] == "spike"]
  assert spikes == [(30, 7.0, 2.0), (31, 7.0, 2.0)]
  assert "warning: toy: the loss of step 30 is 3.5 times the median of those before it\n" in capsys.readouterr().out
  first = Toy(tmp_path / "cut", **settings)
  first.hook = interrupt_at("step", 29)
  with pytest.raises(Interrupted):
    first.fit()
  second = Toy(tmp_path / "cut", **settings)
  second.fit()
  assert without_times(second.records()) == without_times(straight.records())
