"""Stage 1 from data to semantic IDs."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.interactions import Split
from bbqrec_jax.data.pipeline import (
  CatalogueSample,
  FeatureStore,
  PackedHistories,
  evaluation_batches,
  tokenizer_batches,
)
from bbqrec_jax.json_files import write_json
from bbqrec_jax.models.apply import apply
from bbqrec_jax.models.critic import ClubCritic
from bbqrec_jax.models.tokenizer import LossWeights, Tokenizer, TokenizerSettings
from bbqrec_jax.ops.contrastive import normalize
from bbqrec_jax.ops.quantize import residual_kmeans
from bbqrec_jax.ops.ranking import target_ranks
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.semantic_ids.health import behaviour_cohesion, codebook_health, format_health
from bbqrec_jax.semantic_ids.repair import reassign_collisions
from bbqrec_jax.train.logging import MetricsLog, say
from bbqrec_jax.train.loop import Plan, fit
from bbqrec_jax.train.optimizer import make_optimizer
from bbqrec_jax.train.parallel import Partitioner
from bbqrec_jax.train.state import TrainState
from bbqrec_jax.train.steps import Disentangling, make_tokenizer_step


def tokenizer_settings(config: Any, dataset: Dataset) -> TokenizerSettings:
  """The shapes that a config and a data set give."""
  t = config.tokenizer
  return TokenizerSettings(
    modalities=tuple((name, array.shape[1]) for name, array in dataset.features.items()),
    num_items=dataset.num_items,
    code_width=t.code_width,
    num_levels=t.num_levels,
    num_codes=t.num_codes,
    hidden=tuple(t.hidden),
    item_id=t.item_id,
    normalize=t.normalize,
    history_layers=t.history_layers,
    history_heads=t.history_heads,
    max_length=t.max_length,
    dropout=t.dropout,
  )


class CatalogueEncoder:
  """Latents and codes of every item, a block of items at a time."""

  def __init__(self, model: Tokenizer, store: FeatureStore, *, block: int = 2048):
    """`block` items are encoded at once."""
    self._model, self._store = model, store
    self._block = min(block, model.settings.num_items)

    def encode(params, items, features, present):
      latents = apply(model, params, "latents", items, features, present)
      flat = latents.values.reshape(-1, latents.values.shape[-1])
      codes = apply(model, params, "quantize", flat).codes
      return latents.values, latents.present, codes.reshape(*latents.values.shape[:2], -1)

    self._encode = jax.jit(encode)

  def __call__(self, params: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(latents [S, N, d], present [S, N], codes [S, N, L])."""
    num_items, blocks = self._model.settings.num_items, []
    for first in range(0, num_items, self._block):
      # The last block reaches back, so that every block has one shape and is compiled once.
      items = np.arange(self._block) + min(first, num_items - self._block)
      fresh = items >= first
      result = jax.device_get(self._encode(params, items, *self._store.rows(items)))
      blocks.append([part[:, fresh] for part in result])
    latents, present, codes = (np.concatenate(parts, axis=1) for parts in zip(*blocks, strict=True))
    return latents, present, codes


def fit_codebooks(
  latents: np.ndarray, present: np.ndarray, *, num_levels: int, num_codes: int, iterations: int, points: int, seed: int
) -> np.ndarray:
  """Residual k-means over the present latents of all streams.

  Args:
    latents: [S, N, d].
    present: [S, N] bool.
    num_levels: L.
    num_codes: K.
    iterations: of Lloyd's algorithm at each level.
    points: latents that are used; drawn at random where there are more.
    seed: of the draw and of the seeding.

  Returns:
    [L, K, d] float32.
  """
  rows = latents[present]
  if len(rows) > points:
    rows = rows[np.random.default_rng(seed).choice(len(rows), points, replace=False)]
  fitted = residual_kmeans(
    jax.random.key(seed), jnp.asarray(rows), num_levels=num_levels, num_codes=num_codes, iterations=iterations
  )
  return np.asarray(fitted)


class ContrastRecall:
  """Sequence-to-item Recall@10 on validation: how well the tokenizer's own history states find the next item."""

  def __init__(self, model: Tokenizer, split: Split, *, users: int = 4096):
    """Judges the first `users` users."""
    self._split, self._users, self._max_length = split, users, model.settings.max_length
    item_id = "id" in model.settings.streams

    def rank(params, latents, quantized, batch):
      vectors = quantized + latents[model.settings.streams.index("id")] if item_id else quantized
      states = apply(
        model,
        params,
        "history_states",
        vectors[batch["items"]],
        batch["segments"],
        batch["positions"],
        deterministic=True,
      )
      last = jnp.maximum(jnp.sum(batch["segments"], axis=1) - 1, 0)
      state = jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
      return target_ranks(normalize(state) @ normalize(vectors).T, batch["targets"])

    self._rank = jax.jit(rank)

  def __call__(self, params: Any, latents: np.ndarray, codes: np.ndarray) -> float:
    """Recall@10 for latents [S, N, d] and the fused stream's codes [N, L]."""
    codebooks = params["codebooks"]
    quantized = sum(codebooks[level][codes[:, level]] for level in range(len(codebooks)))
    ranks, seen = [], 0
    for batch in evaluation_batches(
      self._split.train, self._split.validation_target, batch_size=256, max_length=self._max_length
    ):
      valid = batch.pop("valid")
      ranks.append(np.asarray(self._rank(params, latents, quantized, batch))[valid])
      seen += int(valid.sum())
      if seen >= self._users:
        break
    return float(np.mean(np.concatenate(ranks) < 10))


def run_tokenizer(
  config: Any,
  dataset: Dataset,
  split: Split,
  *,
  data_hash: str,
  workdir: pathlib.Path,
  partitioner: Partitioner,
  log: MetricsLog,
) -> SemanticIds:
  """Trains the tokenizer (or goes on with it), quantizes the catalogue, repairs collisions, writes the artefact.

  Returns:
    The semantic IDs, also in `workdir/tokenizer`, with the health report in `health.json`.
  """
  t, folder = config.tokenizer, workdir / "tokenizer"
  settings = tokenizer_settings(config, dataset)
  model = Tokenizer(settings)
  store = FeatureStore(dataset.features, dataset.present)
  process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
  histories = PackedHistories(
    split.train,
    batch_rows=t.batch_rows,
    max_length=t.max_length,
    row_length=t.row_length,
    whole=True,
    seed=config.seed,
    **process,
  )
  batches = tokenizer_batches(
    histories, store, CatalogueSample(dataset.num_items, t.batch_items, config.seed), **process
  )
  optimizer = make_optimizer(t.optimizer, total_steps=t.steps)
  items = np.arange(1)
  example = dict(zip(("items", "features", "present"), (items, *store.rows(items)), strict=True))
  params = jax.jit(model.init)(jax.random.key(config.seed), example)["params"]
  idle = jnp.zeros((t.num_levels, t.num_codes), jnp.int32)
  state = TrainState.create(params, optimizer, seed=config.seed, idle=idle)
  disentangling = None
  if t.weights.disentangle:
    critic = ClubCritic(dataset.modalities, t.code_width)
    disentangling = Disentangling(critic, optax.adam(t.club.learning_rate), t.club.steps, t.club.bound == "full")
    zeros = {name: jnp.zeros((1, t.code_width)) for name in dataset.modalities}
    critic_params = jax.jit(critic.init)(jax.random.key(config.seed), zeros)["params"]
    state = state.replace(  # type: ignore[attr-defined]
      critic=critic_params, critic_opt_state=disentangling.optimizer.init(critic_params)
    )
  encode = CatalogueEncoder(model, store)
  contrast_recall = ContrastRecall(model, split)

  def before_step(step: int, state: TrainState) -> TrainState:
    if step != t.warmup_steps:
      return state
    latents, present, _ = encode(state.params)
    codebooks = fit_codebooks(
      latents,
      present,
      num_levels=t.num_levels,
      num_codes=t.num_codes,
      iterations=t.kmeans_iterations,
      points=t.kmeans_points,
      seed=config.seed,
    )
    params = state.params | {"codebooks": partitioner.replicate(codebooks)}
    return state.replace(params=params)  # type: ignore[attr-defined]

  def evaluate(state: TrainState) -> dict[str, float]:
    latents, _, codes = encode(state.params)
    health = codebook_health(codes[-1], codes[-1], num_codes=t.num_codes)
    return {
      "usage_level_1": health["usage"][0],
      "perplexity_level_1": health["perplexity"][0],
      "collision_rate": health["collision_rate_before"],
      "contrast_recall@10": contrast_recall(state.params, latents, codes[-1]),
    }

  plan = Plan(
    name="tokenizer",
    steps=t.steps,
    log_every=config.log_every,
    evaluate_every=t.evaluate_every,
    evaluate=evaluate,
    before_step=before_step,
  )
  step = make_tokenizer_step(
    model,
    optimizer,
    weights=LossWeights(**t.weights),
    commitment=t.commitment,
    temperature=t.temperature,
    warmup_steps=t.warmup_steps,
    revival_patience=t.revival_patience,
    disentangling=disentangling,
  )
  state, progress = fit(
    plan,
    state,
    None,
    step,
    batches,
    partitioner=partitioner,
    directory=workdir / "checkpoints" / "tokenizer",
    log=log,
  )
  latents, present, codes = encode(state.params)
  codebooks = np.asarray(state.params["codebooks"])
  ids = SemanticIds(
    streams=settings.streams,
    codes=reassign_collisions(codes[-1], latents[-1], codebooks),
    stream_codes=codes,
    present=present,
    codebooks=codebooks,
    data_hash=data_hash,
  )
  health = codebook_health(codes[-1], ids.codes, num_codes=t.num_codes)
  health["seconds"] = progress["training_seconds"] + progress["evaluation_seconds"]
  health["contrast_recall@10"] = contrast_recall(state.params, latents, codes[-1])
  last = split.train.items[split.train.offsets[1:] - 1]
  health["cohesion"] = behaviour_cohesion(codes[-1], last, split.validation_target)
  write_json(folder / "health.json", health)
  ids.save(folder)
  say(format_health(health))
  return ids
