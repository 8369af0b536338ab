"""The training stage of the tokenizer: from data to semantic IDs."""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np

from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.feature_store import FeatureStore
from bbqrec_jax.data.features import feature_widths
from bbqrec_jax.data.interactions import Interactions, Split
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.data.pipeline import CatalogueSample, PackedHistories, tokenizer_batches
from bbqrec_jax.ops.randomness import base_key
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.semantic_ids.health import codebook_health, format_health
from bbqrec_jax.semantic_ids.repair import reassign_collisions, suffix_collisions
from bbqrec_jax.tokenizer.club import make_disentangling
from bbqrec_jax.tokenizer.evaluate import CatalogueEncoder, ContrastRecall, Inspection, tokenizer_health
from bbqrec_jax.tokenizer.inference import InferenceTokenizer, encode_blocks, id_space, inference_parameters
from bbqrec_jax.tokenizer.model import Tokenizer, codebooks_of
from bbqrec_jax.tokenizer.quantizers import make_quantizer
from bbqrec_jax.tokenizer.settings import TokenizerSettings, unchecked_settings
from bbqrec_jax.tokenizer.state import TokenizerState, even_usage
from bbqrec_jax.tokenizer.step import make_tokenizer_step
from bbqrec_jax.training.logging import MetricsLog
from bbqrec_jax.training.loop import Plan, compiled_step, fit
from bbqrec_jax.training.optimizer import make_optimizer
from bbqrec_jax.training.partitioning import Partitioner, StepFunction
from bbqrec_jax.training.settings import Safeguards
from bbqrec_jax.training.state import TrainState
from bbqrec_jax.utils import processes
from bbqrec_jax.utils.json_files import write_json
from bbqrec_jax.utils.messages import say


def tokenizer_settings(config: Any, dataset: Dataset) -> TokenizerSettings:
  """The settings of a (checked) config, with the shapes that a data set gives.

  Where nothing is learned there are no item IDs, and each stream has codebooks in columns of its own.
  """
  settings = unchecked_settings(config)
  if not make_quantizer(settings).trained:
    settings = dataclasses.replace(settings, item_id="none", codebooks="per_stream")
  modalities = tuple(feature_widths(dataset.features).items())
  return dataclasses.replace(settings, modalities=modalities, num_items=dataset.num_items)


def build_semantic_ids(
  settings: TokenizerSettings,
  latents: np.ndarray,
  present: np.ndarray,
  codes: np.ndarray,
  codebooks: np.ndarray,
  encoder: dict[str, np.ndarray],
  *,
  data_hash: str,
  item_ids: ItemIds,
) -> tuple[SemanticIds, np.ndarray]:
  """Repairs collisions: (the artefact, the IDs before repair [N, P L])."""
  raw, id_latents, id_codebooks = id_space(settings, latents, codes, codebooks)
  if settings.repair == "suffix":
    repaired = suffix_collisions(raw, num_codes=settings.num_codes)
  else:
    repaired = reassign_collisions(raw, id_latents, id_codebooks)
  ids = SemanticIds(
    streams=settings.streams,
    codes=repaired,
    stream_codes=codes,
    present=present,
    codebooks=codebooks,
    data_hash=data_hash,
    item_ids=item_ids,
    settings=dataclasses.asdict(settings),
    encoder=encoder,
  )
  return ids, raw


def _finish(ids: SemanticIds, raw: np.ndarray, health: dict[str, Any], folder: pathlib.Path) -> SemanticIds:
  """Completes the health report with what repair did, writes it and the artefact, and reads that in every process."""
  repaired = codebook_health(raw, ids.codes[:, : raw.shape[1]], num_codes=ids.num_codes)
  health |= {
    "collision_rate_after": codebook_health(ids.codes, ids.codes, num_codes=ids.num_codes)["collision_rate_before"]
  }
  health["moved"] = repaired["moved"] if ids.codes.shape == raw.shape else int(np.sum(ids.codes[:, -1] > 0))
  write_json(folder / "health.json", health)
  say(format_health(health))
  if processes.is_first():
    ids.save(folder)
  processes.wait_for_all("the semantic IDs are written")
  # Not each its own: where hosts differ, so may the last digit, and with it a code.
  return SemanticIds.load(folder)


def run_feature_tokenizer(
  config: Any, dataset: Dataset, split: Split, *, data_hash: str, workdir: pathlib.Path
) -> SemanticIds:
  """Semantic IDs of the standardised features themselves, one codebook per stream: no gradient, no behaviour.

  Returns:
    As `run_tokenizer`.
  """
  start = time.monotonic()
  settings, store = tokenizer_settings(config, dataset), dataset.store
  codebooks, encoder = make_quantizer(settings).fit_features(store, seed=config.seed), store.arrays()
  tokenizer = InferenceTokenizer(settings, encoder, codebooks)
  latents, present, codes = encode_blocks(lambda items: tokenizer(*store.rows(items)), dataset.num_items, block=2048)
  ids, raw = build_semantic_ids(
    settings, latents, present, codes, codebooks, encoder, data_hash=data_hash, item_ids=dataset.item_ids
  )
  health = tokenizer_health(settings, raw, split)
  health |= {"reconstruction": {}, "reconstruction_from_codes": {}, "contrast_recall@10": None}
  fused = ids.vectors("fused")
  columns = np.cumsum([0] + [width for _, width in settings.modalities])
  for index, name in enumerate(settings.names):
    here, mine = present[index], slice(columns[index], columns[index + 1])
    for key, vectors in (("reconstruction", ids.vectors(name)), ("reconstruction_from_codes", fused)):
      error = np.square(vectors[here, mine] - latents[index][here, mine])
      health[key][name] = float(error.sum(axis=1).mean())  # The latents are already divided by the root of the width.
  health |= {"seconds": time.monotonic() - start, "skipped_steps": 0}
  return _finish(ids, raw, health, workdir / "tokenizer")


class Training(NamedTuple):
  """What trains a tokenizer.

  Attributes:
    model: the tokenizer.
    initial_state: makes the state before the first step.
    step: see `make_tokenizer_step`.
    batches: the input pipeline.
    shared: makes what every step is given beside them: the features of all items where devices are to hold them,
      otherwise None.
  """

  model: Tokenizer
  initial_state: Callable[[], TokenizerState]
  step: StepFunction
  batches: grain.IterDataset
  shared: Callable[[], Any]


def tokenizer_training(
  settings: TokenizerSettings, histories: Interactions, store: FeatureStore, *, seed: int
) -> Training:
  """Everything that training needs, as the settings describe it.

  Args:
    settings: what `tokenizer_settings` gives.
    histories: the training histories.
    store: the features of all items.
    seed: of the run.
  """
  s = settings
  model, optimizer = Tokenizer(s), make_optimizer(s.optimizer, total_steps=s.steps)
  process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
  rows = PackedHistories(
    histories, batch_rows=s.batch_rows, max_length=s.max_length, row_length=s.row_length, whole=True, seed=seed,
    **process,
  )  # fmt: skip
  held = store.nbytes <= s.device_features * 2**20
  sample = CatalogueSample(s.num_items, s.batch_items, seed)
  batches = tokenizer_batches(rows, None if held else store, sample, **process)

  def initial_state() -> TokenizerState:
    items = np.arange(1, dtype=np.int32)
    example = dict(zip(("items", "features", "present"), (items, *store.rows(items)), strict=True))
    params = model.init(base_key(seed), example)["params"]
    club, club_opt_state, disentangling = None, None, make_disentangling(s)
    if disentangling is not None:
      zeros = {name: jnp.zeros((1, s.code_width), jnp.float32) for name in s.names}
      club = disentangling.network.init(base_key(seed), zeros)["params"]
      club_opt_state = disentangling.optimizer.init(club)
    return TokenizerState.create(
      params, optimizer, seed=seed, usage=even_usage(s.codebook_shape), club=club,
      club_opt_state=club_opt_state,
    )  # fmt: skip

  step = make_tokenizer_step(model, optimizer)
  return Training(model, initial_state, step, batches, store.table if held else lambda: None)


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
  settings, folder = tokenizer_settings(config, dataset), workdir / "tokenizer"
  quantizer = make_quantizer(settings)
  if not quantizer.trained:
    return run_feature_tokenizer(config, dataset, split, data_hash=data_hash, workdir=workdir)
  store = dataset.store
  model, initial_state, step, batches, shared = tokenizer_training(settings, split.train, store, seed=config.seed)
  encode = CatalogueEncoder(model, store, partitioner=partitioner)
  contrast_recall = ContrastRecall(model, split, partitioner=partitioner)
  inspect = Inspection(model, store, seed=config.seed, partitioner=partitioner)

  def fit_codebooks(state: TrainState) -> TrainState:
    latents, present, _ = encode(state.params)
    codebooks = processes.of_the_first(quantizer.fit(latents, present, seed=config.seed))
    params = state.params | {"codebooks": partitioner.place(codebooks)}
    usage = partitioner.place(even_usage(settings.codebook_shape))
    return state.replace(params=params, usage=usage)  # type: ignore[attr-defined]

  def examine(state: TrainState) -> tuple[dict[str, Any], tuple[np.ndarray, ...]]:
    """The health report of a state, and the catalogue's latents, present and codes."""
    encoded = encode(state.params)
    latents, _, codes = encoded
    codebooks = codebooks_of(settings, partitioner.fetch(state.params))
    raw, _, _ = id_space(settings, latents, codes, codebooks)
    health = tokenizer_health(settings, raw, split) | inspect(state.params)
    # Without the contrast nothing has taught the history's states where to point.
    told = settings.weights.contrast > 0
    health["contrast_recall@10"] = contrast_recall(state.params, latents, codes[-1]) if told else None
    return health, encoded

  def evaluate(state: TrainState) -> dict[str, float]:
    health, _ = examine(state)
    write_json(folder / "health.json", health)
    values = {"collision_rate": health["collision_rate_before"]}
    if settings.weights.contrast:
      values["contrast_recall@10"] = health["contrast_recall@10"]
    for name in ("usage", "perplexity"):
      values |= {f"{name}_level_{level + 1}": value for level, value in enumerate(health[name])}
    for name in ("cohesion", "reconstruction", "reconstruction_from_codes", "specific_r2"):
      values |= {f"{name}_{part}": value for part, value in health[name].items()}
    return values

  plan = Plan(
    name="tokenizer",
    steps=settings.steps,
    log_every=config.log_every,
    evaluate_every=settings.evaluate_every,
    evaluate=evaluate,
    before={settings.warmup_steps: fit_codebooks} if quantizer.fixed() is None else {},
    steps_per_call=config.steps_per_call,
    item_ids=dataset.item_ids,
    safeguards=Safeguards.of(config),
  )
  state, progress = fit(
    plan,
    partitioner.create(initial_state),
    partitioner.place(shared()),
    compiled_step(step, plan.safeguards, partitioner),
    batches,
    partitioner=partitioner,
    directory=workdir / "checkpoints" / "tokenizer",
    log=log,
  )
  health, (latents, present, codes) = examine(state)
  params = partitioner.fetch(state.params)
  codebooks = codebooks_of(settings, params)
  encoder = inference_parameters(settings, params) | store.arrays()
  ids, raw = build_semantic_ids(
    settings, latents, present, codes, codebooks, encoder, data_hash=data_hash, item_ids=dataset.item_ids
  )
  health["seconds"] = sum(progress[f"{kind}_seconds"] for kind in ("training", "evaluation", "checkpoint"))
  health["skipped_steps"] = progress["skipped"]
  return _finish(ids, raw, health, folder)
