"""All that is worth measuring when an accelerator is at hand, in one command; what is done is kept after each step.

    python experiments/accelerator.py --output=accelerator --data=DIR
    python experiments/accelerator.py --output=accelerator --only=agreement --only=compile --limit=120
    JAX_PLATFORMS=cpu python experiments/accelerator.py --output=trial --only=agreement --size=small   # a trial

- `agreement`: the loss and its gradient of the tokenizer, and the loss, its gradient and the ranking of every head and
  of the encoder-decoder on the device, in float32 and bfloat16, beside those of the CPU in float32, from the same
  parameters and batch.
- `attention`: attention with the similarity bias as the program writes it and as `jax.nn.dot_product_attention` has it,
  by XLA and, on NVIDIA, by cuDNN: milliseconds with gradients, and how far apart the outcomes are.
- `compile`: `first_call_s` of a step of each stage, each in a process of its own, without a cache, with an empty one,
  with the one that this filled, and with XLA's own part of the cache switched off; on NVIDIA also with the autotuner of
  fusions switched off.
- `benchmark`: `bbqrec benchmark`, small, paper and large.
- `rows`: a step of 32 to 4,096 histories, of the dense and the hybrid head.
- `calls`: 1, 8 and 32 steps in one call (`steps_per_call`), of the tokenizer and of the dense and the hybrid head.
- `recipe`: `bbqrec train --config=hybrid` on `--data`, twice, the second time with a warm cache.
- `profile`: a trace of twenty steps for TensorBoard or Perfetto.

`OUTPUT/steps.json` has of each step its command, seconds, status and result; the same command again does what is
missing and what has failed. A step that takes more than `--limit` seconds is stopped, and is a row that says so.
"""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from absl import flags

from bbqrec_jax.command_line import define_path, quiet_flags, start

PARTS = ("agreement", "attention", "compile", "benchmark", "rows", "calls", "recipe", "profile")
PATHS = ("tokenizer", "generative", "parallel", "dense", "hybrid", "encoder_decoder")
ROWS = (32, 128, 512, 1024, 4096)
CALLS = (1, 8, 32)
NO_FUSION_AUTOTUNER = "--xla_gpu_experimental_enable_fusion_autotuner=false"
_BBQREC = (sys.executable, "-m", "bbqrec_jax")
_THIS = (sys.executable, os.path.abspath(__file__))


class Step(NamedTuple):
  """A process.

  Attributes:
    name: of its row.
    command: whose standard output, or `result`, is what it found.
    environment: added to this process's.
    result: a JSON file that it writes; None: the last line that it prints is one.
  """

  name: str
  command: tuple[str, ...]
  environment: dict[str, str]
  result: pathlib.Path | None = None


def steps(part: str, folder: pathlib.Path, *, size: str, data: pathlib.Path | None, nvidia: bool) -> Iterator[Step]:
  """The steps of a part, in an order in which each cache is filled before it is read."""
  if part == "agreement":
    for name in PATHS:
      yield Step(f"agreement/{name}", (*_THIS, f"--work=agreement:{name}"), {"JAX_PLATFORMS": ""})
  elif part == "attention":
    for dtype in ("float32", "bfloat16"):
      yield Step(f"attention/{dtype}", (*_THIS, f"--work=attention:{dtype}:{size}"), {})
  elif part == "compile":
    for case in ("tokenizer", "causal/dense", "causal/hybrid"):
      for flag in ("", NO_FUSION_AUTOTUNER) if nvidia else ("",):
        kept = str(folder / "caches" / f"{case}{flag}".replace("/", "_"))
        more = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()} if flag else {}
        for name, environment in {
          "no cache": {"JAX_ENABLE_COMPILATION_CACHE": "false"},
          "empty cache": {"JAX_COMPILATION_CACHE_DIR": kept},
          "warm cache": {"JAX_COMPILATION_CACHE_DIR": kept},
          "empty cache without XLA's": {
            "JAX_COMPILATION_CACHE_DIR": f"{kept}_alone", "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none"
          },
        }.items():  # fmt: skip
          label = "/".join(["compile", case, name, *(["fusion autotuner off"] if flag else [])])
          yield _timed(label, f"{case}/train step", folder, size, environment=environment | more)
  elif part == "benchmark":
    for name in ("small", "paper", "large") if size != "small" else ("small",):
      path = folder / f"benchmark_{name}.json"
      config = "benchmark" if name == "small" else f"benchmark_{name}"
      yield Step(f"benchmark/{name}", (*_BBQREC, "benchmark", f"--config={config}", f"--output={path}"), {}, path)
  elif part == "rows":
    for head in ("dense", "hybrid"):
      for rows in ROWS if size != "small" else ROWS[:1]:
        changes = (f"--config.run.recommender.batch_rows={rows}",)
        yield _timed(f"rows/{head}/{rows}", f"causal/{head}/train step", folder, size, *changes)
  elif part == "calls":
    for case in ("tokenizer", "causal/dense", "causal/hybrid"):
      for calls in CALLS:
        changes = (f"--config.run.steps_per_call={calls}",)
        yield _timed(f"calls/{case}/{calls}", f"{case}/train step", folder, size, *changes)
  elif part == "recipe" and data is not None:
    for name in ("cold", "warm"):
      workdir = folder / f"recipe_{name}"
      command = (*_BBQREC, "train", "--config=hybrid", f"--data={data}", f"--workdir={workdir}")
      cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "caches" / "recipe")}
      yield Step(f"recipe/{name}", command, cache, workdir / "results.json")
  elif part == "profile":
    yield Step("profile", (*_THIS, f"--work=profile:{folder / 'trace'}"), {})


def _timed(
  name: str, case: str, folder: pathlib.Path, size: str, *changes: str, environment: dict[str, str] | None = None
) -> Step:
  """`bbqrec benchmark` of one case."""
  path = folder / "timed" / (name.replace("/", "_").replace(" ", "_") + ".json")
  config = "benchmark" if size == "small" else f"benchmark_{size}"
  command = (*_BBQREC, "benchmark", f"--config={config}", f"--only={case}", f"--output={path}", *changes)
  return Step(name, command, environment or {}, path)


def do(step: Step, *, limit: float) -> dict[str, Any]:
  """Runs a step, and says what came of it."""
  begin = time.perf_counter()
  record: dict[str, Any] = {"name": step.name, "command": list(step.command), "environment": step.environment}
  try:
    done = subprocess.run(
      step.command, env=os.environ | step.environment, capture_output=True, text=True, timeout=limit
    )
  except subprocess.TimeoutExpired:
    return record | {"status": f"stopped after {limit:.0f} s", "seconds": limit}
  record |= {"status": done.returncode, "seconds": round(time.perf_counter() - begin, 2)}
  if done.returncode:
    return record | {"error": done.stderr[-2000:]}
  found = step.result.read_text() if step.result else done.stdout.strip().splitlines()[-1]
  return record | {"result": json.loads(found)}


def agreement(path: str) -> dict[str, Any]:
  """How far the device is from the CPU in float32, for each dtype: of loss, gradient and first ten items."""
  import jax
  import numpy as np

  from bbqrec_jax.benchmarks.cases import random_dataset
  from bbqrec_jax.presets import benchmark_config

  config = benchmark_config("small")
  dataset, device, host = random_dataset(config), jax.devices()[0], jax.devices("cpu")[0]
  found: dict[str, Any] = {"device": str(device.device_kind)}
  for dtype in ("float32", "bfloat16") if path != "tokenizer" else ("float32",):
    results = []
    for place, kind in ((host, "float32"), (device, dtype)):
      with jax.default_device(host):
        loss, ranker, params, shared, batch, asked = _problem(path, config, dataset, kind)
      held = jax.device_put((params, shared, batch), place)
      value, gradient = jax.device_get(jax.jit(jax.value_and_grad(loss))(*held))
      flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])
      top = None if ranker is None else np.asarray(jax.jit(ranker)(*held[:2], jax.device_put(asked, place))["top"])
      results.append((float(value), flat, top))
    (loss_there, gradient_there, top_there), (loss_here, gradient_here, top_here) = results
    found[dtype] = {
      "loss": abs(loss_here - loss_there) / abs(loss_there),
      "gradient": float(np.linalg.norm(gradient_here - gradient_there) / np.linalg.norm(gradient_there)),
    }
    if top_there is not None:
      same = [len(set(a) & set(b)) / len(a) for a, b in zip(top_there.tolist(), top_here.tolist(), strict=True)]
      found[dtype]["same_of_ten"] = float(np.mean(same))
  return found


def _problem(path: str, config: Any, dataset: Any, dtype: str) -> tuple[Any, ...]:
  """Of a path: (loss of (parameters, shared, batch), ranker or None, parameters, shared, batch, what is ranked)."""
  import jax
  import jax.numpy as jnp

  from bbqrec_jax.benchmarks.cases import random_ids
  from bbqrec_jax.data.pipeline import features_of
  from bbqrec_jax.data.ranking import evaluation_batches
  from bbqrec_jax.layers.apply import apply
  from bbqrec_jax.recommender.evaluate import make_ranker
  from bbqrec_jax.recommender.schedule import training_batches
  from bbqrec_jax.recommender.train import build_recommender, initial_state
  from bbqrec_jax.tokenizer.club import make_disentangling
  from bbqrec_jax.tokenizer.losses import tokenizer_loss
  from bbqrec_jax.tokenizer.train import tokenizer_settings, tokenizer_training

  if path == "tokenizer":
    settings = tokenizer_settings(config.run, dataset)
    training = tokenizer_training(settings, dataset.interactions, dataset.store, seed=config.run.seed)
    state, disentangling = jax.jit(training.initial_state)(), make_disentangling(settings)

    def tokenizer(params: Any, shared: Any, batch: Any) -> Any:
      table, club = shared
      batch = batch | features_of(batch, lambda items: jax.tree.map(lambda array: array[items], table))
      bound = None if disentangling is None else disentangling.bound(club, axis_name=None)
      return tokenizer_loss(
        training.model, params, batch, quantized=jnp.bool_(True), temperature=settings.temperature, bound=bound,
        key=jax.random.key(0), axis_name=None,
      )[0]  # fmt: skip

    return tokenizer, None, state.params, (training.shared(), state.club), next(iter(training.batches)), None
  name = "encoder_decoder/generative" if path == "encoder_decoder" else f"causal/{path}"
  run, histories = config.run.copy_and_resolve_references(), dataset.interactions
  run.recommender.update(config.recommenders[name])
  run.recommender.dtype = dtype
  model, catalogue = build_recommender(
    run, random_ids(config, dataset.modalities), histories, num_items=config.num_items
  )
  params = jax.jit(lambda: initial_state(run, model, catalogue, total_steps=1))().params
  batch = next(iter(training_batches(run, histories)))
  asked = next(
    evaluation_batches(histories, histories.items[histories.offsets[1:] - 1], batch_size=64, max_length=50)
  )  # fmt: skip
  del asked["valid"]

  def loss(params: Any, shared: Any, batch: Any) -> Any:
    return apply(model, params, "loss", shared, batch, deterministic=True)[0]

  return loss, make_ranker(model, beam_width=50), params, catalogue, batch, asked


def attention_ways(case: str) -> dict[str, Any]:
  """Attention with a bias in three ways: of each milliseconds with gradients, and its distance from the first.

  Args:
    case: DTYPE:SIZE.
  """
  import jax
  import jax.numpy as jnp

  from bbqrec_jax.ops.attention import attention, history_mask

  dtype, _, size = case.partition(":")
  rows, length, heads, width = (4, 32, 2, 16) if size == "small" else (64, 256, 8, 64)
  keys = jax.random.split(jax.random.key(0), 4)
  query, key, value = (jax.random.normal(k, (rows, length, heads, width), dtype) for k in keys[:3])
  bias = jax.random.normal(keys[3], (rows, heads, length, length), dtype)
  mask = history_mask(jnp.ones((rows, length), jnp.int32))
  library = functools.partial(jax.nn.dot_product_attention, mask=mask)
  ways: dict[str, Callable[..., Any]] = {
    "ours": lambda q, k, v, b: attention(q, k, v, mask=mask, bias=b),
    "jax.nn, XLA": lambda q, k, v, b: library(q, k, v, b, implementation="xla"),
    "jax.nn, cuDNN": lambda q, k, v, b: library(q, k, v, b, implementation="cudnn"),
  }
  found: dict[str, Any] = {"device": str(jax.devices()[0].device_kind), "shape": [rows, length, heads, width]}
  first = None
  for name, way in ways.items():
    total = jax.jit(
      jax.value_and_grad(lambda *given, w=way: jnp.sum(jnp.sin(w(*given).astype(jnp.float32))), (0, 1, 2, 3))
    )
    try:
      results = jax.block_until_ready(total(query, key, value, bias))
      begin = time.perf_counter()
      jax.block_until_ready([total(query, key, value, bias) for _ in range(20)])
      row: dict[str, Any] = {"milliseconds": 50 * (time.perf_counter() - begin)}
    except Exception as error:  # What a device or a library has no way for: of any kind.
      found[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
      continue
    flat = jnp.concatenate([jnp.ravel(leaf).astype(jnp.float32) for leaf in results[1]])
    first = flat if first is None else first
    found[name] = row | {"gradient": float(jnp.linalg.norm(flat - first) / jnp.linalg.norm(first))}
  return found


def profile(folder: str) -> dict[str, Any]:
  """A trace of twenty steps of the dense head, after those that compile."""
  import jax

  from bbqrec_jax.benchmarks.cases import all_cases
  from bbqrec_jax.presets import benchmark_config

  call = next(iter(all_cases(benchmark_config("paper"), ("causal/dense/train step",)))).make()
  jax.block_until_ready([call(), call()])
  with jax.profiler.trace(folder):
    jax.block_until_ready([call() for _ in range(20)])
  return {"trace": folder}


def main(argv: list[str]) -> None:
  """Does the steps that are missing, or is one of them."""
  del argv
  options = quiet_flags()
  if options.work:
    kind, _, rest = options.work.partition(":")
    work = {"agreement": agreement, "attention": attention_ways, "profile": profile}
    print(json.dumps(work[kind](rest)))
    return
  folder = pathlib.Path(options.output).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / "steps.json"
  records = json.loads(path.read_text()) if path.exists() else []
  records = [record for record in records if record["status"] == 0]  # What failed is tried again.
  known = {record["name"] for record in records}
  nvidia = shutil.which("nvidia-smi") is not None
  for part in options.only:
    for step in steps(part, folder, size=options.size, data=options.data, nvidia=nvidia):
      if step.name in known:
        continue
      record = do(step, limit=options.limit)
      records.append(record)
      path.write_text(json.dumps(records, indent=2))
      print(f"{step.name}: {record['status']}, {record['seconds']} s", flush=True)


if __name__ == "__main__":
  define_path("output", "A folder; the same one again goes on.")
  define_path("data", "A data set for the whole recipe.")
  flags.DEFINE_multi_enum("only", list(PARTS), PARTS, "Which parts; given once for each.")
  flags.DEFINE_enum("size", "paper", ["small", "paper"], "Of what is compiled and timed; small is a trial.")
  flags.DEFINE_float("limit", 300.0, "Seconds of one step.", lower_bound=1.0)
  flags.DEFINE_string("work", None, "For the processes that this one starts.")
  start(main)
