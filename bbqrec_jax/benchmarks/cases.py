"""What is timed: the steps, the search and the pipelines that a run is made of, on random data of a config's sizes."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bbqrec_jax.benchmarks.counting import cost
from bbqrec_jax.benchmarks.timing import Case
from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.interactions import from_lengths
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.data.ranking import evaluation_batches
from bbqrec_jax.layers.apply import apply
from bbqrec_jax.recommender.evaluate import make_ranker
from bbqrec_jax.recommender.schedule import training_batches
from bbqrec_jax.recommender.step import make_recommender_step
from bbqrec_jax.recommender.train import build_recommender, initial_state
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.tokenizer.train import tokenizer_settings, tokenizer_training
from bbqrec_jax.training.optimizer import make_optimizer
from bbqrec_jax.training.partitioning import StepFunction, make_partitioner
from bbqrec_jax.training.step import in_turn, side_by_side

_TOKENIZED = 2048  # Items in a call of tokenization, as many as a run encodes of a catalogue at once.


def random_dataset(config: Any) -> Dataset:
  """Histories and features of a benchmark config's sizes; nothing is to be learned from them."""
  rng = np.random.default_rng(0)
  lengths = np.clip(rng.geometric(1 / 8, config.num_users), 3, config.run.recommender.max_length)
  features = {
    name: rng.normal(size=(config.num_items, width)).astype(np.float32) for name, width in config.modalities.items()
  }
  items, users = rng.integers(config.num_items, size=lengths.sum()), np.arange(config.num_users).astype(str)
  present = {name: np.ones(config.num_items, bool) for name in features}
  ids, titles = ItemIds.numbered(config.num_items), ("",) * config.num_items
  return Dataset("random", "random", from_lengths(items, lengths, users), features, present, ids, titles)


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
  name: str, work: float, partitioner: Any, step: StepFunction, state: Callable[[], Any], shared: Any, batch: Any,
  dtype: str = "float32", steps: int = 1,
) -> Case:  # fmt: skip
  """So many training steps of `work` items in a call, the state donated from call to call; `state` makes the first."""
  if steps > 1:
    step, batch, work = in_turn(step), side_by_side([batch] * steps), work * steps

  def make():
    compiled, constant = partitioner.compile_step(step), partitioner.place(shared)
    current = partitioner.place(state())

    def call():
      nonlocal current
      current, metrics = compiled(current, constant, batch)
      return metrics

    return call

  single = functools.partial(step, axis_name=None)
  return Case(f"{name}/train step", work, "items", make, lambda: cost(single, jax.eval_shape(state), shared, batch),
              dtype)  # fmt: skip


def _map_case(
  name: str, work: float, unit: str, partitioner: Any, function: Callable[..., Any], state: Callable[[], Any],
  shared: Any, batch: Any, dtype: str = "float32",
) -> Case:  # fmt: skip
  """A function of (params, shared, batch); `state` makes what has the parameters."""

  def make():
    compiled = partitioner.compile_map(function)
    held = partitioner.place((state().params, shared))
    return lambda: compiled(*held, batch)

  return Case(name, work, unit, make, lambda: cost(function, jax.eval_shape(state).params, shared, batch), dtype)


def _pipeline_case(name: str, work: float, batches: Callable[[], Any]) -> Case:
  def make():
    data = iter(batches())
    return lambda: next(data)["segments"]

  return Case(f"{name}/input pipeline", work, "items", make)


def tokenizer_cases(config: Any, dataset: Dataset) -> Iterator[Case]:
  """A training step, tokenization and the pipeline of the tokenizer."""
  store, settings, partitioner = dataset.store, tokenizer_settings(config.run, dataset), make_partitioner(config.run)

  def make_training():
    return tokenizer_training(settings, dataset.interactions, store, seed=config.run.seed)

  training = make_training()
  work = settings.batch_items + settings.batch_rows * settings.row_length
  # Past the warm-up, so that everything of a step is done.
  step = jnp.asarray(settings.warmup_steps, jnp.int32)
  state = jax.jit(lambda: training.initial_state().replace(step=step))
  batch = next(iter(training.batches))
  yield _step_case("tokenizer", work, partitioner, training.step, state, training.shared(), batch,
                   steps=config.run.steps_per_call)  # fmt: skip

  def encode(params, shared, batch):
    del shared
    values = apply(training.model, params, "latents", *batch).values
    return jnp.swapaxes(apply(training.model, params, "quantize", values).codes, 0, 1)

  items = np.arange(min(_TOKENIZED, config.num_items))
  rows = (items, *store.rows(items))
  yield _map_case("tokenizer/tokenization", len(items), "items", partitioner, encode, state, None, rows)
  yield _pipeline_case("tokenizer", work, lambda: make_training().batches)


def recommender_cases(config: Any, dataset: Dataset, ids: SemanticIds, names: list[str]) -> Iterator[Case]:
  """Training steps and rankings of the recommenders that are named, and a pipeline for each of their backbones."""
  backbones = set()
  for name in names:
    run = copy.deepcopy(config.run)
    run.recommender.update(config.recommenders[name])
    partitioner, dtype = make_partitioner(run), run.recommender.dtype
    model, catalogue = build_recommender(run, ids, dataset.interactions, num_items=config.num_items)
    state = jax.jit(functools.partial(initial_state, run, model, catalogue, total_steps=1))
    step = make_recommender_step(model, make_optimizer(run.recommender.optimizer, total_steps=run.recommender.steps))
    make_batches = functools.partial(training_batches, run, dataset.interactions)
    batch = next(iter(make_batches()))
    work = int(np.sum(batch["segments"] > 0))
    yield _step_case(name, work, partitioner, step, state, catalogue, batch, dtype, run.steps_per_call)
    targets, users = dataset.interactions.items[dataset.interactions.offsets[1:] - 1], run.evaluation.batch_size
    asked = next(evaluation_batches(dataset.interactions, targets, batch_size=users,
                                    max_length=run.recommender.max_length))  # fmt: skip
    del asked["valid"]
    ranker = make_ranker(model, beam_width=run.evaluation.beam_width)
    yield _map_case(f"{name}/ranking", users, "users", partitioner, ranker, state, catalogue, asked, dtype)
    if run.recommender.backbone not in backbones:
      backbones.add(run.recommender.backbone)
      yield _pipeline_case(run.recommender.backbone, work, make_batches)


def all_cases(config: Any, only: tuple[str, ...] = ()) -> Iterator[Case]:
  """Every case of a config whose name begins with one of `only` (() means all), each made as it is asked for."""
  dataset = random_dataset(config)
  # A pipeline has the name of a backbone; to make a recommender takes longer than to leave out its cases.
  backbones = tuple(name.split("/")[0] for name in only)
  names = [name for name in config.recommenders if not only or name.startswith(backbones)]
  ids = random_ids(config, dataset.modalities)
  for cases in (tokenizer_cases(config, dataset), recommender_cases(config, dataset, ids, names)):
    yield from (case for case in cases if not only or case.name.startswith(only))
