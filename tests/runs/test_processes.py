"""Two processes train what one does, one of them speaks for both, and both go on after a signal."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from bbqrec_jax.errors import InputError
from bbqrec_jax.runs import run as experiment
from bbqrec_jax.runs.restore import restore
from bbqrec_jax.runs.workdir import PARTS
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.training.partitioning import MeshJit, Pmap
from bbqrec_jax.utils import processes

ROOT = pathlib.Path(__file__).parents[2]
# Small, and with little to compile; 81 items do not divide by two devices.
CHANGES = {
  "log_every": 5,
  "data.synthetic.num_users": 100, "data.synthetic.num_items": 81, "data.modalities": ("text",),
  "tokenizer.num_codes": 16, "tokenizer.num_levels": 2, "tokenizer.code_width": 8, "tokenizer.hidden": (16,),
  "tokenizer.steps": 20, "tokenizer.warmup_steps": 10, "tokenizer.evaluate_every": 20, "tokenizer.batch_items": 32,
  "tokenizer.batch_rows": 4, "tokenizer.max_length": 8, "tokenizer.row_length": 8, "tokenizer.kmeans_iterations": 3,
  "tokenizer.weights.disentangle": 0.0, "tokenizer.revival_threshold": 0.0,
  "recommender.head": "dense", "recommender.width": 8, "recommender.mlp_width": 8, "recommender.num_layers": 1,
  "recommender.num_buckets": 4, "recommender.similarity": ("fused",), "recommender.max_length": 8,
  "recommender.row_length": 8, "recommender.batch_rows": 8, "recommender.steps": 20, "recommender.evaluate_every": 10,
  "evaluation.batch_size": 100,
}  # fmt: skip
MESH = {"partitioner": "mesh", "shard_rows": 64}
SASREC = {
  "partitioner": "pmap", "recommender.item_inputs": ("item",), "recommender.similarity": (),
  "recommender.accumulation": 2,
}  # fmt: skip


def start_both(workdir, changes, *, command=("bbqrec_jax.main",)):
  """Two processes of one device each, connected with one another."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  # Without kept programs: both compile alike, and neither waits long for the other.
  flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
  env = os.environ | {
    "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  }  # fmt: skip
  fields = [f"--config.{name}={value}" for name, value in (CHANGES | changes).items()]
  together = ["--distributed=on", f"--coordinator=localhost:{port}", "--num_processes=2"]
  call = [sys.executable, "-m", *command, "--config=configs/quickstart.py", f"--workdir={workdir}", *fields, *together]
  return [
    subprocess.Popen(
      [*call, f"--process_id={index}"], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for index in range(2)
  ]


def finish(both):
  """What each printed, once both have ended well."""
  outputs = [process.communicate(timeout=300) for process in both]
  for process, (_, errors) in zip(both, outputs, strict=True):
    assert process.returncode == 0, errors
  return [printed for printed, _ in outputs]


def run_alone(load_file, workdir, changes, partitioner, monkeypatch):
  """The same in this process, over two devices."""
  config = load_file("configs/quickstart.py").get_config()
  config.update_from_flattened_dict(CHANGES | changes)
  monkeypatch.setattr(experiment, "make_partitioner", lambda config: partitioner)
  return experiment.run(config, workdir)


def read_json(path):
  return json.loads(path.read_text(encoding="utf-8"))


def records(workdir):
  """The lines of metrics.jsonl by stage, kind and step."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
  found = {(line["stage"], line["kind"], line["step"]): line for line in lines}
  assert len(found) == len(lines), "a step was logged twice"
  return found


def assert_same_run(together, alone):
  """Results, every logged figure and the best parameters, within rounding."""
  results, expected = read_json(together / "results.json"), read_json(alone / "results.json")
  for name in ("best_step", "steps", "data", *PARTS):
    assert results[name] == expected[name], name
  logged, expected_records = records(together), records(alone)
  assert logged.keys() == expected_records.keys()
  for place, line in expected_records.items():
    for name in line.keys() - {"time", "stage", "kind"}:
      assert logged[place][name] == pytest.approx(line[name], rel=1e-4, abs=1e-6), (place, name)
  params, expected_params = (restore(workdir).params for workdir in (together, alone))
  assert jax.tree.structure(params) == jax.tree.structure(expected_params)
  for leaf, other in zip(jax.tree.leaves(params), jax.tree.leaves(expected_params), strict=True):
    np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-6)


# In the second process k-means gives other codebooks, as it may where sums are added up in any order.
UNEVEN = """
import runpy
import jax
from bbqrec_jax.tokenizer.quantizers import Quantizer
fit = Quantizer.fit
Quantizer.fit = lambda *args, **options: fit(*args, **options) * (1 + 0.1 * jax.process_index())
runpy.run_module("bbqrec_jax.main", run_name="__main__")
"""


def test_two_processes_are_stopped_go_on_and_equal_one(load_file, tmp_path, monkeypatch):
  together, alone = tmp_path / "together", tmp_path / "alone"
  (tmp_path / "uneven.py").write_text(UNEVEN, encoding="utf-8")
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))
  both = start_both(together, MESH, command=("uneven",))
  # Between the stages: the next step is the recommender's first.
  while not SemanticIds.exists(together / "tokenizer"):
    assert all(process.poll() is None for process in both), [process.communicate() for process in both]
    time.sleep(0.05)
  both[1].send_signal(signal.SIGTERM)
  printed = finish(both)
  assert "stopped by SIGTERM, everything is saved; the same command goes on from here" in printed[0]
  saved = [int(path.name) for path in (together / "checkpoints" / "recommender").iterdir()]
  assert len(saved) == 1
  assert 1 <= saved[0] < 20
  assert not (together / "results.json").exists()

  printed = finish(start_both(together, MESH))
  assert f"recommender: going on from step {saved[0]}" in printed[0]
  assert "recall@10" in printed[0]
  # One speaks for both.
  assert not [line for line in printed[1].splitlines() if not line.startswith("[Gloo]")]

  run_alone(load_file, alone, MESH, MeshJit(shard_rows=64, devices=jax.devices()[:2]), monkeypatch)
  monkeypatch.undo()
  assert_same_run(together, alone)
  ids, expected = SemanticIds.load(together / "tokenizer"), SemanticIds.load(alone / "tokenizer")
  np.testing.assert_array_equal(ids.codes, expected.codes)
  differences = load_file("experiments/processes.py").differences
  apart = differences(alone, together)
  # Of validation and test, with and without the history.
  assert (apart["ranks"], apart["ranks that differ"], apart["semantic ids that differ"]) == (4 * 100, 0, 0)
  assert max(apart["parameters"], apart["codebooks"], *apart["training loss, relative"].values()) < 1e-4
  # And it does see a difference: another loss at one step of one stage, another rank.
  changed = tmp_path / "changed"
  shutil.copytree(alone, changed)
  lines = [json.loads(line) for line in (changed / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
  first = next(line for line in lines if (line["stage"], line["kind"]) == ("tokenizer", "train"))
  first["loss"] *= 1.25
  (changed / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
  with np.load(changed / "ranks.npz", allow_pickle=False) as ranks:
    arrays = dict(ranks)
  arrays["test"][3] += 1
  np.savez(changed / "ranks.npz", **arrays)
  seen = differences(alone, changed)
  assert seen["training loss, relative"] == {"tokenizer": pytest.approx(0.2), "recommender": 0}
  assert (seen["parameters"], seen["codebooks"], seen["ranks that differ"]) == (0, 0, 1)
  np.testing.assert_allclose(ids.codebooks, expected.codebooks, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def sasrec(tmp_path_factory):
  """The workdir of two processes that nothing befell."""
  workdir = tmp_path_factory.mktemp("sasrec") / "together"
  finish(start_both(workdir, SASREC))
  return workdir


def test_two_processes_of_pmap_equal_one(sasrec, load_file, tmp_path, monkeypatch):
  together, alone = sasrec, tmp_path / "alone"
  run_alone(load_file, alone, SASREC, Pmap(devices=jax.devices()[:2]), monkeypatch)
  monkeypatch.undo()
  assert_same_run(together, alone)


# Who gives no sign of life for so many seconds is lost.
IMPATIENT = """
import runpy
from bbqrec_jax.utils import processes
processes.LOST_AFTER = 8
runpy.run_module("bbqrec_jax.main", run_name="__main__")
"""


def test_when_one_is_killed_the_other_says_so_in_one_line_and_both_go_on(sasrec, tmp_path, monkeypatch):
  workdir = tmp_path / "run"
  (tmp_path / "impatient.py").write_text(IMPATIENT, encoding="utf-8")
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))
  told = {
    1: "process 1 of this run gave no sign of life for 8 s",
    0: "process 0 of this run cannot be reached any more (it is given 8 s to answer)",
  }
  for victim, place in ((1, "recommender 5/20 "), (0, "recommender 15/20 ")):
    both = start_both(workdir, SASREC, command=("impatient",))
    assert any(line.startswith(place) for line in both[0].stdout), both[0].stderr.read()
    both[victim].kill()
    killed = time.monotonic()
    _, errors = both[1 - victim].communicate(timeout=60)
    assert time.monotonic() - killed < 1.5 * 8
    assert errors == (
      f"error: {told[victim]}; start all processes again, and the same command goes on from the last checkpoint\n"
    )
    assert both[1 - victim].returncode == -signal.SIGABRT
    both[victim].communicate()
    assert not (workdir / "results.json").exists()
  printed = finish(start_both(workdir, SASREC))
  assert "recommender: going on from step 10" in printed[0]
  results, expected = read_json(workdir / "results.json"), read_json(sasrec / "results.json")
  assert all(results[name] == expected[name] for name in ("best_step", "steps", *PARTS))
  assert [line | {"time": 0} for line in records(workdir).values()] == [
    line | {"time": 0} for line in records(sasrec).values()
  ]
  params, expected_params = (restore(one).params for one in (workdir, sasrec))
  jax.tree.map(np.testing.assert_array_equal, params, expected_params)


def test_an_unknown_way_is_refused_before_anything_runs(tmp_path):
  command = [sys.executable, "experiments/processes.py", f"--output={tmp_path / 'x.json'}", "--ways=pmap,mush"]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert (result.returncode, result.stdout) == (2, "")
  assert result.stderr == "error: flag --ways=['pmap', 'mush']: expected some of pmap, mesh, mesh_spread\n"


@pytest.fixture
def joined(monkeypatch):
  """What `jax.distributed.initialize` is given; none of a cluster's variables are set."""
  given = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **options: given.append(arguments))
  for name in list(os.environ):
    if name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR", "KUBERNETES_")):
      monkeypatch.delenv(name)
  return given


def test_auto_joins_what_is_found_and_is_off_on_a_lone_host(joined, monkeypatch):
  processes.join("auto")
  processes.join("on")
  assert joined == [(None, None, None)] * 2
  processes.join("off")
  # A launcher that started one process: nothing to join. The innermost launcher is asked.
  monkeypatch.setenv("SLURM_NTASKS", "1")
  processes.join("auto")
  assert len(joined) == 2
  monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
  processes.join("auto")
  assert len(joined) == 3
  processes.join("auto", coordinator="host:1", num_processes=2, process_id=1)
  assert joined[3:] == [("host:1", 2, 1)]


def refuse_to_join(error):
  def initialize(*arguments, **options):
    raise error

  return initialize


def test_nothing_found_is_an_error_only_where_it_must_be_there(joined, monkeypatch):
  monkeypatch.setattr(
    jax.distributed, "initialize", refuse_to_join(ValueError("coordinator_address should be defined."))
  )
  processes.join("auto")
  with pytest.raises(
    InputError, match="--distributed=on found no cluster that JAX knows: give --coordinator=host:port"
  ):
    processes.join("on")
  # Where somebody named a coordinator, a run alone is not what was meant.
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
  with pytest.raises(InputError, match="cannot join the others"):
    processes.join("auto")


def test_a_cluster_that_cannot_be_joined_is_an_error_whatever_the_mode(joined, monkeypatch):
  monkeypatch.setattr(jax.distributed, "initialize", refuse_to_join(RuntimeError("pod x does not have a controller.")))
  for mode in ("auto", "on"):
    with pytest.raises(InputError, match=r"cannot join the others of its run \(pod x does not have a controller\.\)"):
      processes.join(mode)


@pytest.mark.parametrize(
  ("mode", "given", "named"),
  [
    ("on", {"coordinator": "host:1"}, "got 1 of --coordinator, --num_processes and --process_id"),
    ("auto", {"num_processes": 2, "process_id": 0}, "got 2 of --coordinator"),
    ("off", {"coordinator": "host:1", "num_processes": 2, "process_id": 0}, "--distributed=off got 3 of"),
    ("on", {"coordinator": "host:1", "num_processes": 2, "process_id": 2}, "--process_id must be from 0 to 1"),
  ],
)
def test_flags_that_do_not_fit_together_are_refused(joined, mode, given, named):
  with pytest.raises(InputError, match=named):
    processes.join(mode, **given)
  assert joined == []


def test_only_errors_that_may_be_of_others_wait_for_the_end_of_all(monkeypatch):
  naps = []
  monkeypatch.setattr(time, "sleep", naps.append)

  def fail(error, cause=None):
    with pytest.raises(type(error)) as raised, processes.ended_together():
      raise error from cause
    assert raised.value is error

  gloo = ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
  fail(gloo)
  assert naps == []  # Alone.
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  fail(InputError("--config: expected a number"))
  fail(InputError("data: a file is missing"), FileNotFoundError("INTERNAL"))
  fail(RuntimeError("RESOURCE_EXHAUSTED: Out of memory"))
  assert naps == []
  fail(gloo)
  fail(InputError("this checkpoint cannot be used"), gloo)
  fail(RuntimeError("DEADLINE_EXCEEDED: Barrier timed out"))
  assert naps == [1.5 * processes.LOST_AFTER] * 3
  with processes.ended_together():
    pass


def test_a_lone_process_waits_for_nobody_and_speaks_for_itself():
  assert processes.is_first()
  assert not processes.told_to_stop()
  processes.wait_for_all("nobody")
