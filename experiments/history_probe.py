"""Sequence-to-item recall of any tokenizer: the history transformer of the contrast, trained on frozen vectors alone.

A tokenizer that was made without the contrast has no states to judge, and one that was made with it has some that were
trained together with its codes. Here all are asked alike what their codes tell of the next item: the vectors that the
codes stand for are given, and only what reads them is learned (this project's choice).
"""

import contextlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bbqrec_jax.data.interactions import Split
from bbqrec_jax.data.pipeline import PackedHistories, recommender_batches
from bbqrec_jax.layers.apply import apply
from bbqrec_jax.layers.dense import Dense
from bbqrec_jax.layers.padding import without_padding
from bbqrec_jax.ops.contrastive import following, info_nce
from bbqrec_jax.ops.randomness import base_key
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.tokenizer.evaluate import SequenceRecall
from bbqrec_jax.tokenizer.model import history_reader
from bbqrec_jax.tokenizer.settings import TokenizerSettings, unchecked_settings
from bbqrec_jax.training.optimizer import make_optimizer
from bbqrec_jax.training.partitioning import StepFunction, make_partitioner, reduce_shares
from bbqrec_jax.training.state import TrainState, step_key
from bbqrec_jax.training.step import Metrics, updated
from bbqrec_jax.utils.messages import say

# The same for every tokenizer: on Scientific validation rises no more after 1,000 steps, on Beauty after some 3,500.
STEPS, EVALUATE_EVERY = 4000, 500


class HistoryProbe(nn.Module):
  """A linear map of frozen vectors, and the tokenizer's history transformer over what it makes of them.

  Attributes:
    settings: of a tokenizer with such a transformer.
  """

  settings: TokenizerSettings

  def setup(self):
    """Makes the submodules."""
    self.map = Dense(self.settings.code_width, name="map")
    self.history, self.query = history_reader(self.settings)

  def vectors(self, frozen: jax.Array) -> jax.Array:
    """What histories are made of and what they point at: [..., d'] -> [..., d]."""
    return self.map(frozen)

  def history_states(
    self, vectors: jax.Array, segments: jax.Array, positions: jax.Array, *, deterministic: bool
  ) -> jax.Array:
    """As the tokenizer's: [R, C, d] -> [R, C, d]."""
    return self.query(self.history(vectors, segments, positions, deterministic=deterministic))

  def __call__(self, frozen: jax.Array, segments: jax.Array, positions: jax.Array) -> jax.Array:
    """Touches every parameter, for `init`."""
    return self.history_states(self.vectors(frozen), segments, positions, deterministic=True)


class ProbedRecall(NamedTuple):
  """Sequence-to-item Recall@10 over all users.

  Attributes:
    validation: the best that was seen.
    test: of the same step.
    step: which that is.
  """

  validation: float
  test: float
  step: int


def id_vectors(ids: SemanticIds) -> np.ndarray:
  """What the codes of each item's ID stand for as the quantizer chose them, [N, d'] float32.

  The sum of the codewords, and nothing that no code tells; side by side where several streams make the ID.
  """
  streams = ids.modalities if ids.settings["semantic_id"] == "concatenated" else ("fused",)
  return np.concatenate([ids.vectors(name) for name in streams], axis=1)


def make_probe_step(model: HistoryProbe, optimizer: optax.GradientTransformation) -> StepFunction:
  """The step: each position's state against the item that follows it, as in stage 1.

  Returns:
    step(state, frozen [N, d'], batch, *, axis_name) -> (state, metrics).
  """

  def step(state: TrainState, frozen: Any, batch: Any, *, axis_name: str | None) -> tuple[TrainState, Metrics]:
    key = step_key(state, axis_name)
    items, segments = batch["items"], batch["segments"]
    target, has_target = following(segments)

    def loss_function(params):
      vectors = apply(model, params, "vectors", without_padding(frozen)[items])
      states = apply(
        model, params, "history_states", vectors, segments, batch["positions"], deterministic=False,
        rngs={"dropout": key},
      )  # fmt: skip
      states, vectors = (array.reshape(-1, array.shape[-1]) for array in (states, vectors))
      return info_nce(
        states, vectors[target], items.reshape(-1)[target], has_target, temperature=model.settings.temperature,
        axis_name=axis_name,
      )  # fmt: skip

    (loss, terms), gradients = reduce_shares(jax.value_and_grad(loss_function, has_aux=True)(state.params), axis_name)
    return updated(state, optimizer, gradients, {"loss": loss, **terms})

  return step


def train_probe(
  config: Any, vectors: np.ndarray, split: Split, *, steps: int = STEPS, evaluate_every: int = EVALUATE_EVERY
) -> ProbedRecall:
  """Trains a probe on the training histories, and judges it by the step that is best on validation.

  The transformer, the temperature, batches and optimiser are those of
  `config.tokenizer`. The vectors are centred and divided by one number, which brings their mean variance to 1.

  Args:
    config: of the run, with its seed.
    vectors: [N, d'] of the items.
    split: of their histories.
    steps: of training.
    evaluate_every: steps between two validations.
  """
  t, partitioner = config.tokenizer, make_partitioner(config)
  settings = unchecked_settings(config)
  model, optimizer = HistoryProbe(settings), make_optimizer(t.optimizer, total_steps=steps)
  centred = vectors - vectors.mean(axis=0)
  frozen = partitioner.place(centred / np.sqrt(max(centred.var(axis=0).mean(), np.finfo(np.float32).tiny)))

  def initial_state() -> TrainState:
    nowhere = jnp.zeros((1, 1), jnp.int32)
    example = jnp.zeros((1, 1, vectors.shape[1]), jnp.float32), nowhere, nowhere
    params = model.init(base_key(config.seed), *example)["params"]
    return TrainState.create(params, optimizer, seed=config.seed)

  map_items = partitioner.compile_map(
    lambda params, frozen, items: apply(model, params, "vectors", without_padding(frozen)[items])
  )
  sequence_recall = SequenceRecall(model, max_length=t.max_length, partitioner=partitioner)

  def judge(params: Any, stage: str) -> float:
    targets = {"validation": split.validation_target, "test": split.test_target}[stage]
    mapped = np.asarray(map_items(params, frozen, np.arange(len(vectors), dtype=np.int32)))
    return sequence_recall(params, mapped, split.history(stage), targets)

  histories = PackedHistories(
    split.train, batch_rows=t.batch_rows, max_length=t.max_length, row_length=t.row_length, whole=True,
    seed=config.seed, process_index=jax.process_index(), process_count=jax.process_count(),
  )  # fmt: skip
  step, state = partitioner.compile_step(make_probe_step(model, optimizer)), partitioner.create(initial_state)
  best, best_step, kept = -1.0, 0, None
  with contextlib.closing(iter(recommender_batches(histories))) as data:
    for number in range(1, steps + 1):
      state, _ = step(state, frozen, next(data))
      if number % evaluate_every == 0 or number == steps:
        recall = judge(state.params, "validation")
        say(f"sequence-to-item {number}/{steps}  validation recall@10 {recall:.4f}")
        if recall > best:
          best, best_step, kept = recall, number, partitioner.fetch(state.params)
  return ProbedRecall(best, judge(partitioner.place(kept), "test"), best_step)
