"""What is timed: the steps, the search and the pipelines that a run is made of, on random data of a config's sizes."""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bbqrec_jax.benchmarks.counting import cost
from bbqrec_jax.benchmarks.timing import Case
from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.interactions import Interactions, from_lengths
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.data.pipeline import evaluation_batches
from bbqrec_jax.layers.apply import apply
from bbqrec_jax.ops.attention import attention, history_mask
from bbqrec_jax.recommender.evaluate import make_ranker
from bbqrec_jax.recommender.step import make_recommender_step
from bbqrec_jax.recommender.train import build_recommender, initial_state, training_batches
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.tokenizer.train import tokenizer_settings, tokenizer_training
from bbqrec_jax.training.optimizer import make_optimizer
from bbqrec_jax.training.partitioning import StepFunction, make_partitioner

# Backbone and head of each recommender, by name.
RECOMMENDERS = {
  "causal/generative": {"recommender.head": "generative"},
  "causal/parallel": {"recommender.head": "parallel"},
  "causal/dense": {"recommender.head": "dense"},
  "causal/hybrid": {"recommender.head": "hybrid"},
  "causal/dense without bias": {"recommender.head": "dense", "recommender.similarity": ()},
  "causal/generative without bias": {"recommender.head": "generative", "recommender.similarity": ()},
  "encoder_decoder/generative": {
    "recommender.backbone": "encoder_decoder", "recommender.head": "generative", "recommender.similarity": (),
    "recommender.item_inputs": ("fused",),
  },
}  # fmt: skip


def random_dataset(config: Any) -> Dataset:
  """Histories and features of a benchmark config's sizes; nothing is to be learned from them."""
  rng = np.random.default_rng(0)
  longest = config.run.recommender.max_length
  lengths = np.clip(rng.geometric(1 / 8, config.num_users), 3, longest)
  features = {
    name: rng.normal(size=(config.num_items, width)).astype(np.float32) for name, width in config.modalities.items()
  }
  return Dataset(
    name="random",
    source="random",
    interactions=from_lengths(
      rng.integers(config.num_items, size=lengths.sum()), lengths, np.arange(config.num_users).astype(str)
    ),
    features=features,
    present={name: np.ones(config.num_items, bool) for name in features},
    item_ids=ItemIds.numbered(config.num_items),
    titles=("",) * config.num_items,
  )


def random_ids(config: Any, modalities: tuple[str, ...]) -> SemanticIds:
  """Distinct random IDs, and random codes of each stream."""
  t, rng = config.run.tokenizer, np.random.default_rng(1)
  chosen = rng.choice(t.num_codes**t.num_levels, size=config.num_items, replace=False)
  codes = np.stack(np.unravel_index(chosen, (t.num_codes,) * t.num_levels), axis=1).astype(np.int32)
  streams = (*modalities, "fused")
  own = rng.integers(t.num_codes, size=(len(modalities), config.num_items, t.num_levels)).astype(np.int32)
  return SemanticIds(
    streams=streams,
    codes=codes,
    stream_codes=np.concatenate([own, codes[None]]),
    present=np.ones((len(streams), config.num_items), bool),
    codebooks=rng.normal(size=(1, t.num_levels, t.num_codes, t.code_width)).astype(np.float32),
    data_hash="random",
    item_ids=ItemIds.numbered(config.num_items),
  )


def _step_case(
  name: str, work: float, unit: str, partitioner: Any, step: StepFunction, state: Callable[[], Any], shared: Any,
  batch: Any, *, dtype: str = "float32",
) -> Case:  # fmt: skip
  """A training step, the state donated from call to call; `state` makes the first."""
  single = functools.partial(step, axis_name=None)

  def make():
    compiled, constant = partitioner.compile_step(step), partitioner.place(shared)
    # A copy of its own: the first call gives its buffers away.
    current = partitioner.place(jax.tree.map(jnp.copy, state()))

    def call():
      nonlocal current
      current, metrics = compiled(current, constant, batch)
      return metrics

    return call

  return Case(name, work, unit, make, lambda: cost(single, jax.eval_shape(state), shared, batch), dtype)


def _map_case(
  name: str, work: float, unit: str, partitioner: Any, function: Callable[..., Any], state: Callable[[], Any],
  shared: Any, batch: Any, *, dtype: str = "float32",
) -> Case:  # fmt: skip
  """A function of (params, shared, batch); `state` makes what has the parameters."""

  def make():
    compiled = partitioner.compile_map(function)
    held = partitioner.place((state().params, shared))
    return lambda: compiled(*held, batch)

  return Case(name, work, unit, make, lambda: cost(function, jax.eval_shape(state).params, shared, batch), dtype)


def tokenizer_cases(config: Any, dataset: Dataset) -> Iterator[Case]:
  """A training step, tokenization and the pipeline of the tokenizer."""
  run, store = config.run, dataset.store
  partitioner = make_partitioner(run)
  settings = tokenizer_settings(run, dataset)
  training = tokenizer_training(run, settings, dataset.interactions, store)
  batch = next(iter(training.batches))
  rows = run.tokenizer.batch_items + run.tokenizer.batch_rows * run.tokenizer.row_length
  # Past the warm-up, so that everything of a step is done.
  step = jnp.asarray(run.tokenizer.warmup_steps, jnp.int32)
  state = functools.cache(jax.jit(lambda: training.initial_state().replace(step=step)))  # type: ignore[attr-defined]
  yield _step_case("tokenizer/train step", rows, "items", partitioner, training.step, state, training.shared(), batch)

  count = min(config.tokenized, config.num_items)
  features, present = store.rows(np.arange(count))

  def encode(params, shared, batch):
    del shared
    values = apply(training.model, params, "latents", *batch).values
    return jnp.swapaxes(apply(training.model, params, "quantize", values).codes, 0, 1)

  inputs = (np.arange(count), features, present)
  yield _map_case("tokenizer/tokenization", count, "items", partitioner, encode, state, None, inputs)

  def pipeline():
    data = iter(tokenizer_training(run, settings, dataset.interactions, store).batches)
    return lambda: next(data)["segments"]

  yield Case("tokenizer/input pipeline", rows, "items", pipeline)


def recommender_cases(
  config: Any, dataset: Dataset, ids: SemanticIds, names: Iterable[str] = tuple(RECOMMENDERS)
) -> Iterator[Case]:
  """Training steps, rankings and the pipeline of the recommenders that are named."""
  for name in names:
    changes = RECOMMENDERS[name]
    run = copy.deepcopy(config.run)
    run.update_from_flattened_dict(changes)
    if run.recommender.backbone == "encoder_decoder":
      run.recommender.update(config.encoder_decoder)
    partitioner, dtype = make_partitioner(run), run.recommender.dtype
    model, catalogue = build_recommender(run, ids, dataset.interactions, num_items=config.num_items)
    state = functools.cache(jax.jit(functools.partial(initial_state, run, model, catalogue)))
    step = make_recommender_step(model, make_optimizer(run.recommender.optimizer, total_steps=run.recommender.steps))
    batches = training_batches(run, dataset.interactions)
    batch = next(iter(batches))
    positions = int(np.sum(batch["segments"] > 0))
    yield _step_case(f"{name}/train step", positions, "items", partitioner, step, state, catalogue, batch, dtype=dtype)
    if "without" in name:
      continue
    users = next(_histories(dataset.interactions, run))
    ranker = make_ranker(model, beam_width=run.evaluation.beam_width)
    yield _map_case(
      f"{name}/ranking", run.evaluation.batch_size, "users", partitioner, ranker, state, catalogue, users,
      dtype=dtype,
    )  # fmt: skip
    if name in ("causal/dense", "encoder_decoder/generative"):

      def pipeline(run=run):
        data = iter(training_batches(run, dataset.interactions))
        return lambda: next(data)["segments"]

      yield Case(f"{run.recommender.backbone}/input pipeline", positions, "items", pipeline)


def _histories(interactions: Interactions, run: Any) -> Iterator[Any]:
  targets = interactions.items[interactions.offsets[1:] - 1]
  for batch in evaluation_batches(
    interactions, targets, batch_size=run.evaluation.batch_size, max_length=run.recommender.max_length
  ):
    batch.pop("valid")
    yield batch


def attention_cases(config: Any) -> Iterator[Case]:
  """Attention with a bias, forward and backward, by each implementation that the device has."""
  r, rng = config.run.recommender, np.random.default_rng(2)
  length = r.row_length
  shape = (r.batch_rows, length, r.num_heads, r.width // r.num_heads)
  query, key, value = (jnp.asarray(rng.normal(size=shape), r.dtype) for _ in range(3))
  bias = jnp.asarray(rng.normal(size=(r.batch_rows, r.num_heads, length, length)), jnp.float32)
  mask = history_mask(jnp.ones((r.batch_rows, length), jnp.int32))
  for implementation in ("einsum", "xla", *(("cudnn",) if jax.default_backend() == "gpu" else ())):

    def gradient(query, key, value, bias, implementation=implementation):
      def total(*args):
        return jnp.sum(attention(*args[:3], mask=mask, bias=args[3], implementation=implementation))

      return jax.grad(total, argnums=(0, 1, 2, 3))(query, key, value, bias)

    inputs = (query, key, value, bias)

    def make(gradient=gradient, inputs=inputs):
      compiled = jax.jit(gradient)
      return lambda: compiled(*inputs)

    work = r.batch_rows * length
    yield Case(f"attention/{implementation}", work, "items", make, functools.partial(cost, gradient, *inputs), r.dtype)


def all_cases(config: Any, only: tuple[str, ...] = ()) -> Iterator[Case]:
  """Every case of a config whose name begins with one of `only` (() means all), each made as it is asked for."""

  def cases() -> Iterator[Case]:
    dataset = random_dataset(config)
    yield from tokenizer_cases(config, dataset)
    # A pipeline has the name of a backbone; to make a recommender takes longer than to leave out its cases.
    backbones = tuple(name.split("/")[0] for name in only)
    names = [name for name in RECOMMENDERS if not only or name.startswith(backbones)]
    yield from recommender_cases(config, dataset, random_ids(config, dataset.modalities), names)
    yield from attention_cases(config)

  return (case for case in cases() if not only or case.name.startswith(only))
