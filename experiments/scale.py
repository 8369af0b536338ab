"""What a training step needs of each device, from 10^5 to 10^8 items, tables replicated and sharded.

    python experiments/scale.py --output=scale.json

compiles the steps of both stages for a mesh of eight devices from shapes alone, so that nothing of their size is ever
allocated, and prints what the compiled program says of itself: bytes on each device of the parameters, of what the
optimiser keeps, of the catalogue, and of temporaries; and the number of items at which they outgrow a TPU v5e (16 GiB)
and an H100 (80 GiB). Without a topology, eight CPU devices stand for the mesh. With one,

    pip install 'libtpu==0.0.42.*'  # What the installed jax's extra "tpu" asks for.
    python experiments/scale.py --output=scale_v5e.json --topology=v5e:2x4

the TPU's own compiler does it, with no TPU at hand; what does not fit, it refuses.

The recommenders are those that such a catalogue can be trained with: the dense head with a sampled softmax, and the
generative head on codes alone. Sizes are those of configs/benchmark.py:paper, with larger batches.
"""

import copy
import dataclasses
import importlib.util
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import topologies

from bbqrec_jax.benchmarks.cases import random_dataset, random_ids
from bbqrec_jax.command_line import define_path, start
from bbqrec_jax.recommender.catalogue import Catalogue
from bbqrec_jax.recommender.items import build_catalogue
from bbqrec_jax.recommender.model import Recommender
from bbqrec_jax.recommender.schedule import training_batches
from bbqrec_jax.recommender.step import make_recommender_step
from bbqrec_jax.recommender.train import initial_state
from bbqrec_jax.recommender.two_towers import make_recommender
from bbqrec_jax.semantic_ids.trie import Trie
from bbqrec_jax.tokenizer.train import tokenizer_settings, tokenizer_training
from bbqrec_jax.training.optimizer import make_optimizer
from bbqrec_jax.training.partitioning import MeshJit
from bbqrec_jax.utils.files import check_output
from bbqrec_jax.utils.json_files import write_json

GIB = 2**30
LIMITS = {"TPU v5e": 16 * GIB, "H100": 80 * GIB}
# Of the data set that shapes are taken from: a number that no other dimension has.
_FEW = 1009
_PARTS = ("parameters", "optimizer", "catalogue", "temporaries", "total")
RECOMMENDERS = {
  "dense, sampled softmax": {"recommender.head": "dense", "recommender.num_negatives": 8192},
  "generative, codes alone": {
    "recommender.head": "generative", "recommender.subtree_logits": False,
    "recommender.item_inputs": ("fused", "modalities"),
  },
}  # fmt: skip


def shaped(tree: Any, *, items: int) -> Any:
  """The shapes of arrays of few items, with as many as are asked for."""

  def one(leaf):
    return jax.ShapeDtypeStruct(tuple(items if size == _FEW else size for size in leaf.shape), leaf.dtype)

  return jax.tree.map(one, tree)


def trie_shapes(items: int, *, levels: int, codes: int) -> Trie:
  """The shapes of a trie whose IDs are spread as evenly as can be; a node may have a child for every code."""

  def integers(*shape):
    return jax.ShapeDtypeStruct(shape, np.int32)

  nodes = [min(codes ** (level + 1), items) for level in range(levels)]
  return Trie(
    codes=tuple(integers(count) for count in nodes),
    starts=tuple(integers(count + 1) for count in [1, *nodes[:-1]]),
    items=integers(items),
    paths=integers(items, levels),
    leaves=tuple(integers(count) for count in nodes),
    fanouts=(codes,) * levels,
  )


def steps(config: Any, *, items: int) -> Iterator[tuple[str, Any, Any, Any, Any]]:
  """(name, step, and the shapes of its state, shared data and global batch) of each training step."""
  config = copy.deepcopy(config)
  config.num_items = _FEW
  config.run.tokenizer.device_features = 0
  dataset = random_dataset(config)
  store, ids = dataset.store, random_ids(config, dataset.modalities)
  settings = tokenizer_settings(config.run, dataset)
  few = tokenizer_training(settings, dataset.interactions, store, seed=0)
  many = tokenizer_training(dataclasses.replace(settings, num_items=items), dataset.interactions, store, seed=0)
  yield "tokenizer", many.step, jax.eval_shape(many.initial_state), None, _first(few.batches)
  for name, changes in RECOMMENDERS.items():
    run = copy.deepcopy(config.run)
    run.update_from_flattened_dict(changes)
    catalogue, few_settings = build_catalogue(run, ids, dataset.interactions, num_items=_FEW)
    catalogue = shaped(dataclasses.replace(catalogue, trie=None), items=items)
    if run.recommender.head == "generative":
      trie = trie_shapes(items, levels=run.tokenizer.num_levels, codes=run.tokenizer.num_codes)
      catalogue = dataclasses.replace(catalogue, trie=trie)
    yield recommender_step(name, run, make_recommender(dataclasses.replace(few_settings, num_items=items)), catalogue,
                           _first(training_batches(run, dataset.interactions)))  # fmt: skip


def recommender_step(
  name: str, run: Any, model: Recommender, catalogue: Catalogue, batch: Any
) -> tuple[str, Any, Any, Any, Any]:
  """As `steps` has it."""
  optimizer = make_optimizer(run.recommender.optimizer, total_steps=run.recommender.steps)
  step = make_recommender_step(model, optimizer, accumulation=run.recommender.accumulation)
  state = jax.eval_shape(lambda: initial_state(run, model, catalogue, total_steps=1))
  return f"recommender, {name}", step, state, catalogue, batch


def _first(batches: Any) -> Any:
  iterator = iter(batches)
  batch = next(iterator)
  iterator.close()
  return batch


def on_a_device(tree: Any) -> int:
  """Bytes that each device holds of placed arrays, given as shapes."""

  def one(leaf):
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return 0
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize

  return sum(one(leaf) for leaf in jax.tree.leaves(tree))


def compiled(name: str, step: Any, state: Any, shared: Any, batch: Any, *, items: int, partitioner: MeshJit) -> Any:
  """What a step needs of each device.

  Returns:
    `step`, `items`, `tables` ("replicated" or "sharded"), bytes by part, `flops` of each device in a step as XLA counts
    them, and `refused`, what the compiler said if it would not compile the step for the device; None where unknown.
  """
  state, shared = partitioner.abstract(state), partitioner.abstract(shared)
  batch = partitioner.abstract_batch(batch)
  row: dict[str, Any] = {
    "step": name, "items": items, "tables": "sharded" if partitioner.shard_rows else "replicated",
    "parameters": on_a_device(state.params), "optimizer": on_a_device((state.opt_state, state.club_opt_state)),
    "catalogue": on_a_device(shared), "temporaries": None, "total": None, "flops": None, "refused": None,
  }  # fmt: skip
  try:
    program = partitioner.jit_step(step).lower(state, shared, batch).compile()
  except jax.errors.JaxRuntimeError as error:
    return row | {"refused": str(error).splitlines()[0]}
  memory = program.memory_analysis()
  row["temporaries"] = memory.temp_size_in_bytes
  # What is given away and what comes back share their bytes.
  row["total"] = (
    memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
  )
  row["flops"] = float((program.cost_analysis() or {}).get("flops", 0.0))
  return row


def largest_catalogue(rows: list[dict[str, Any]], limit: int) -> int | None:
  """Items at which the total reaches a limit, on the line through the two largest catalogues that compiled."""
  known = [(row["items"], row["total"]) for row in rows if row["total"] is not None][-2:]
  if len(known) < 2 or known[1][1] <= known[0][1]:
    return None
  (items, total), (more_items, more) = known
  return round(items + (limit - total) * (more_items - items) / (more - total))


def report(rows: list[dict[str, Any]], where: str) -> tuple[str, list[dict[str, Any]]]:
  """Two Markdown tables, and the second's rows: `step`, `tables`, and the largest catalogue by device."""
  lines = [f"Bytes on each device of {where}:", ""]
  lines += [f"| step | items | tables | {' | '.join(f'{part} GiB' for part in _PARTS)} | GFLOP |", "|---" * 9 + "|"]
  for row in rows:
    cells = ["?" if row[part] is None else f"{row[part] / GIB:,.3f}" for part in _PARTS]
    flops = "refused" if row["refused"] else f"{row['flops'] / 1e9:,.1f}"
    lines.append(f"| {row['step']} | {row['items']:,} | {row['tables']} | {' | '.join(cells)} | {flops} |")
  largest = []
  for step, tables in dict.fromkeys((row["step"], row["tables"]) for row in rows):
    chosen = [row for row in rows if (row["step"], row["tables"]) == (step, tables)]
    largest.append({"step": step, "tables": tables} | {
      device: largest_catalogue(chosen, limit) for device, limit in LIMITS.items()
    })  # fmt: skip
  lines += ["", "Items at which a device is full:", "", f"| step | tables | {' | '.join(LIMITS)} |", "|---" * 4 + "|"]
  for entry in largest:
    cells = ["?" if entry[device] is None else f"{entry[device]:,}" for device in LIMITS]
    lines.append(f"| {entry['step']} | {entry['tables']} | {' | '.join(cells)} |")
  return "\n".join(lines), largest


def measure(config: Any, *, items: list[int], devices: Any, shard_rows: int) -> Iterator[dict[str, Any]]:
  """A row for each step, catalogue and way of keeping tables."""
  for count in items:
    for parts in steps(config, items=count):
      for rows in (0, shard_rows):
        yield compiled(*parts, items=count, partitioner=MeshJit(devices=devices, shard_rows=rows))


def benchmark_config() -> Any:
  """The sizes of configs/benchmark.py:paper, with batches for eight devices."""
  path = pathlib.Path(__file__).parents[1] / "configs" / "benchmark.py"
  spec = importlib.util.spec_from_file_location("benchmark_config", path)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config("paper")
  config.num_users = 20_000
  config.run.tokenizer.batch_items = 4096
  config.run.tokenizer.batch_rows = 128
  config.run.recommender.batch_rows = 512
  return config


def main(argv: list[str]) -> None:
  """Compiles, prints and writes."""
  del argv
  options = flags.FLAGS
  if options.topology:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # What was compiled without a device cannot be read back without one.
    jax.config.update("jax_enable_compilation_cache", False)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=options.topology).devices
    where = f"{len(devices)} x {devices[0].device_kind} ({options.topology}, compiled without one)"
  else:
    jax.config.update("jax_num_cpu_devices", options.devices)
    devices = jax.devices()
    where = f"{len(devices)} host devices that stand for a mesh of accelerators"
  rows = []
  for row in measure(
    benchmark_config(), items=[int(float(count)) for count in options.items], devices=devices, shard_rows=10_000
  ):
    print(json.dumps(row), flush=True)
    rows.append(row)
  text, largest = report(rows, where)
  print(text)
  write_json(options.output, {"devices": where, "jax": jax.__version__, "rows": rows, "largest": largest})


if __name__ == "__main__":
  define_path("output", "Where the JSON goes.", check=check_output)
  flags.DEFINE_list("items", ["1e5", "1e6", "1e7", "1e8"], "Sizes of catalogues.")
  flags.DEFINE_integer("devices", 8, "Host devices, where no topology is named.")
  flags.DEFINE_string("topology", "", "Of TPUs to compile for, as v5e:2x4; needs libtpu.")
  flags.mark_flags_as_required(["output"])
  start(main)
