"""The benchmark from config to table: what a record holds, what is refused, and the arithmetic of its tables."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import pytest

from bbqrec_jax.benchmarks import limits
from bbqrec_jax.benchmarks import run as benchmark
from bbqrec_jax.benchmarks.cases import all_cases
from bbqrec_jax.benchmarks.report import table, utilisation
from bbqrec_jax.benchmarks.timing import Case, measure
from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.json_files import write_json


@pytest.fixture
def config(load_file):
  config = load_file("configs/benchmark.py").get_config("small")
  config.num_users, config.num_items, config.windows, config.window_seconds = 200, 100, 2, 1e-3
  config.modalities = {"text": 12, "image": 8}
  config.run.update_from_flattened_dict({
    "tokenizer.num_codes": 16, "tokenizer.code_width": 8, "tokenizer.hidden": (16,), "tokenizer.batch_items": 16,
    "tokenizer.batch_rows": 4, "recommender.width": 8, "recommender.mlp_width": 8, "recommender.num_layers": 1,
    "recommender.batch_rows": 4, "recommender.max_length": 8, "recommender.row_length": 8,
    "evaluation.batch_size": 8, "evaluation.beam_width": 4,
  })  # fmt: skip
  config.recommenders["encoder_decoder/generative"].update({
    "width": 8, "num_layers": 1, "head_width": 4, "mlp_width": 8, "batch_rows": 4, "max_length": 8, "row_length": 8,
  })  # fmt: skip
  return config


def test_every_case_has_a_name_of_its_own_and_is_counted(config):
  cases = list(all_cases(config))
  names = [case.name for case in cases]
  assert len(set(names)) == len(names)
  made = {"tokenizer", *config.recommenders}
  assert {name for name in names if name.endswith("/train step")} == {f"{name}/train step" for name in made}
  for case in cases:
    assert case.work > 0
    assert ("pipeline" in case.name) == (case.cost is None)
  by_name = {case.name: case for case in cases}
  hybrid, dense = (by_name[f"causal/{head}/train step"].cost() for head in ("hybrid", "dense"))
  assert hybrid[0] > dense[0] > 0
  assert hybrid[1] > dense[1] > 0


def test_steps_of_one_call_are_counted_each(config):
  cases = []
  for config.run.steps_per_call in (1, 3):
    cases.append({case.name: case for case in all_cases(config, ("tokenizer/train", "causal/dense/train"))})
  for name, case in cases[0].items():
    assert cases[1][name].work == 3 * case.work
    assert cases[1][name].cost()[0] == 3 * case.cost()[0] > 0
    jax.block_until_ready(cases[1][name].make()())


def test_some_names_make_no_other_cases(config):
  everything = [case.name for case in all_cases(config)]
  for only in (("tokenizer/tok",), ("causal/input",), ("causal/dense",), ("encoder_decoder",)):
    assert [case.name for case in all_cases(config, only)] == [name for name in everything if name.startswith(only)]


def test_a_result_can_be_written_and_read(config, monkeypatch):
  monkeypatch.setattr(benchmark, "measured_limits", lambda: limits.measured_limits(size=64))
  kept = []
  result = benchmark.run(
    config,
    only=("tokenizer/tokenization", "tokenizer/input"),
    keep=lambda result: kept.append(len(result["records"])),
  )
  assert kept == [1, 2]
  names = [record["name"] for record in result["records"]]
  assert names == ["tokenizer/tokenization", "tokenizer/input pipeline"]
  for record in result["records"]:
    assert 0 < record["median_s"] <= record["p90_s"]
    assert record["rate"] == pytest.approx(record["work"] / record["median_s"])
  assert result["about"]["device_count"] == jax.device_count()
  result = json.loads(json.dumps(result))
  text = table(result)
  assert all(name in text for name in names)


def stored(device, config, rates):
  """A result as --output writes it, of records "a/b" and on."""
  records = [{"name": name, "rate": rate, "unit": "items", "of_matmul": share} for name, (rate, share) in rates.items()]
  limits = {"matmul_float32": 2e11, "matmul_bfloat16": 5e10, "copy": 1.5e10}
  return {"schema": 1, "about": {"config": config, "device_kind": device, "device_count": 1}, "limits": limits,
          "records": records}  # fmt: skip


def test_records_of_many_machines_stand_in_one_table_for_each_config(tmp_path):
  results = {
    "1.json": stored("cpu", "small", {"a/b": (1234.5, 0.5), "a/c": (10.0, None)}),
    "2.json": stored("H100", "small", {"a/b": (99999.0, 0.25)}),
    "3.json": stored("H100", "large", {"a/b": (5.0, 0.125)}),
  }
  for name, result in results.items():
    write_json(tmp_path / name, result)
  small, large = benchmark.records(tmp_path).split("`large`:")
  lines = [line for line in small.splitlines() if line.startswith("| ")]
  assert lines == [
    "| a second | 1 x cpu | 1 x H100 |",
    "| measured float32 product, GFLOP | 200 | 200 |",
    "| measured bfloat16 product, GFLOP | 50 | 50 |",
    "| measured copy, GB | 15.0 | 15.0 |",
    "| a/b, items | 1,234 (50%) | 99,999 (25%) |",
    "| a/c, items | 10 |  |",
  ]
  assert "| a/b, items | 5 (12%) |" in large
  with pytest.raises(InputError, match="holds no result"):
    benchmark.records(tmp_path / "nosuch")


def test_the_documented_tables_are_those_of_the_records():
  root = pathlib.Path(__file__).parents[2]
  shown = (root / "docs" / "benchmarks.md").read_text(encoding="utf-8")
  assert benchmark.records(root / "experiments" / "records") in shown


def test_a_cpu_is_called_by_its_model():
  kind = benchmark.device_kind()
  assert kind != "cpu"
  assert kind.endswith(f"{os.cpu_count()} cores")


def test_an_unknown_name_is_refused_before_anything_is_measured(config, monkeypatch):
  monkeypatch.setattr(benchmark, "measured_limits", lambda: pytest.fail("nothing is measured for an unknown name"))
  with pytest.raises(InputError, match="no benchmark begins with nosuch"):
    benchmark.run(config, only=("nosuch",))


def test_files_that_are_not_results_are_refused(tmp_path):
  path = tmp_path / "a.json"
  for text in ("{", "{}", '{"schema": 2}', "[]"):
    path.write_text(text)
    with pytest.raises(InputError, match=r"a\.json: expected"):
      benchmark.read_result(path)
  with pytest.raises(InputError, match="nosuch"):
    benchmark.read_result(tmp_path / "nosuch.json")


def test_utilisation_is_a_share_of_each_limit():
  record = {"median_s": 0.5, "flops": 1e9, "bytes": 4e9, "dtype": "float32"}
  limits = {"matmul_float32": 1e10, "matmul_bfloat16": 1.0, "copy": 1e11}
  assert utilisation(record, limits, {"float32": 4e9, "bfloat16": None}) == {
    "of_matmul": pytest.approx(0.2), "of_copy": pytest.approx(0.08), "of_peak": pytest.approx(0.5),
  }  # fmt: skip
  unknown = utilisation(record | {"flops": None, "bytes": None}, limits, None)
  assert unknown == {"of_matmul": None, "of_copy": None, "of_peak": None}
  assert utilisation(record, limits, {"float32": None})["of_peak"] is None


def test_a_window_holds_as_many_calls_as_it_says():
  made, called = [], []

  def make():
    made.append(jax.jit(lambda x: x + 1))
    return lambda: called.append(1) or made[-1](jnp.ones(3))

  record = measure(Case("a/b", 3, "items", make, lambda: (5.0, 7.0)), windows=3, window_seconds=1e-3)
  assert len(made) == 1
  assert len(called) == 2 + 3 * record["calls"], "the first call, one to judge by, and the windows"
  assert (record["flops"], record["bytes"]) == (5.0, 7.0)


def test_limits_are_work_over_time(monkeypatch):
  shapes = []
  monkeypatch.setattr(limits, "_median_seconds", lambda function, argument, repeats: shapes.append(argument) or 0.5)
  assert limits.measured_limits(size=64) == {
    "matmul_float32": 4 * 64**3, "matmul_bfloat16": 4 * 64**3, "copy": 4 * shapes[-1].nbytes,
  }  # fmt: skip
  assert [str(shape.dtype) for shape in shapes] == ["float32", "bfloat16", "float32"]
