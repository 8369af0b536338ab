"""Stage 2 from histories and semantic IDs to a trained recommender."""

import pathlib
import time
from collections.abc import Callable
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.interactions import Interactions, Split
from bbqrec_jax.data.pipeline import PackedHistories, PrefixHistories, recommender_batches
from bbqrec_jax.errors import InputError
from bbqrec_jax.ops.randomness import base_key
from bbqrec_jax.ops.ranking import LARGEST_CUTOFF
from bbqrec_jax.recommender.catalogue import Catalogue
from bbqrec_jax.recommender.evaluate import WITHOUT_HISTORY, Ranking, evaluate, make_ranker, sample_users
from bbqrec_jax.recommender.items import build_catalogue, item_features
from bbqrec_jax.recommender.model import SequenceModel
from bbqrec_jax.recommender.settings import parts_of
from bbqrec_jax.recommender.step import make_recommender_step
from bbqrec_jax.recommender.two_towers import make_recommender
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.training.logging import MetricsLog
from bbqrec_jax.training.loop import Plan, fit
from bbqrec_jax.training.monitor import Safeguards
from bbqrec_jax.training.optimizer import make_optimizer
from bbqrec_jax.training.partitioning import Partitioner, made_on_host
from bbqrec_jax.training.state import TrainState
from bbqrec_jax.utils import processes
from bbqrec_jax.utils.files import is_given
from bbqrec_jax.utils.json_files import read_json, write_json
from bbqrec_jax.utils.messages import warn


def tokenizer_folder(config: Any, workdir: pathlib.Path) -> pathlib.Path:
  """Where a run's semantic IDs are: its own, or those that its config names."""
  return pathlib.Path(config.tokenizer.artefact) if config.tokenizer.artefact else workdir / "tokenizer"


def check_fingerprint(workdir: pathlib.Path, ids: SemanticIds, *, trained: bool = False) -> None:
  """Notes which semantic IDs a workdir's recommender reads, or makes sure that they are still the same.

  Args:
    workdir: of the run.
    ids: the tokenizer's semantic IDs.
    trained: whether the recommender is trained already, so that there must be a note.

  Raises:
    InputError: if it was trained on others (names both fingerprints), or the note is missing or is none.
  """
  path = workdir / "recommender.json"
  if not trained and not is_given(path):
    write_json(path, {"semantic_ids": ids.fingerprint})
    return
  trained_on = read_json(path).get("semantic_ids")
  if trained_on != ids.fingerprint:
    raise InputError(
      f"{workdir}: the recommender reads semantic IDs with fingerprint {trained_on}, the tokenizer's have"
      f" {ids.fingerprint}; give it back its own, or use another --workdir"
    )


def build_recommender(
  config: Any, ids: SemanticIds | None, histories: Interactions, *, num_items: int, features: np.ndarray | None = None
) -> tuple[SequenceModel, Catalogue]:
  """The model, and the catalogue it reads; the arguments are those of `build_catalogue`."""
  catalogue, settings = build_catalogue(config, ids, histories, num_items=num_items, features=features)
  return make_recommender(settings), catalogue


def initial_state(config: Any, model: SequenceModel, catalogue: Catalogue) -> TrainState:
  """The state before the first step; of the catalogue the shapes are enough."""
  example = {name: jnp.zeros((1, 2), jnp.int32) for name in ("items", "targets", "segments", "positions", "times")}
  if not model.settings.packed:
    example["targets"] = jnp.zeros(1, jnp.int32)
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (catalogue, example))
  params = model.lazy_init(base_key(config.seed), *shapes)["params"]
  optimizer = make_optimizer(config.recommender.optimizer, total_steps=config.recommender.steps)
  return TrainState.create(params, optimizer, seed=config.seed)


def training_batches(config: Any, histories: Interactions) -> grain.IterDataset:
  """The input pipeline of the recommender that a config describes."""
  r = config.recommender
  shape = {"batch_rows": r.batch_rows, "max_length": r.max_length, "seed": config.seed}
  shape |= {"process_index": jax.process_index(), "process_count": jax.process_count()}
  if parts_of(r)[0].rows == "history":
    return recommender_batches(PrefixHistories(histories, bounds=tuple(r.length_buckets), **shape))
  return recommender_batches(PackedHistories(histories, row_length=r.row_length, whole=False, **shape))


def run_recommender(
  config: Any,
  ids: SemanticIds | None,
  split: Split,
  dataset: Dataset,
  *,
  workdir: pathlib.Path,
  partitioner: Partitioner,
  log: MetricsLog,
  warm: Callable[[SequenceModel, Catalogue, Any], Any] | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
  """Trains the recommender (or goes on with it), picks it by validation NDCG@10, ranks the test items once.

  `warm`, of the model, its catalogue and the first parameters, gives others to begin with.

  The rank of each user's validation and test item, in the order of the users, goes into `workdir/ranks.npz`.

  Returns:
    ({"validation": metrics, "test": metrics} of the best model on all users, and the same with `WITHOUT_HISTORY` after
    the names, where no user's own history is ranked; the loop's progress record).
  """
  r, e = config.recommender, config.evaluation
  with made_on_host():
    features = item_features(config, dataset.store)
    model, catalogue = build_recommender(config, ids, split.train, num_items=dataset.num_items, features=features)
  if not model.exact and e.beam_width < min(LARGEST_CUTOFF, catalogue.num_items):
    warn(
      f"config field evaluation.beam_width = {e.beam_width}: what stands further back counts as a miss, so figures at"
      f" higher cutoffs, up to {LARGEST_CUTOFF}, are too low"
    )
  ranker = partitioner.compile_map(make_ranker(model, beam_width=e.beam_width))
  shared = partitioner.place(catalogue)
  some, shown = sample_users(split, e.validation_users, seed=config.seed), split.history("validation")

  def rank(params: Any, stage_histories: Interactions, targets: np.ndarray, **options: Any) -> Ranking:
    return evaluate(
      ranker,
      params,
      shared,
      stage_histories,
      targets,
      batch_size=e.batch_size,
      max_length=r.max_length,
      num_items=catalogue.num_items,
      bounds=tuple(r.length_buckets),
      **options,
    )

  plan = Plan(
    name="recommender",
    steps=r.steps,
    log_every=config.log_every,
    evaluate_every=r.evaluate_every,
    evaluate=lambda state: rank(state.params, shown, split.validation_target, users=some).metrics,
    select="ndcg@10",
    patience=r.patience,
    item_ids=dataset.item_ids,
    safeguards=Safeguards.of(config),
  )
  optimizer = make_optimizer(r.optimizer, total_steps=r.steps)
  state = partitioner.create(lambda: initial_state(config, model, catalogue))
  if warm is not None:
    state = state.replace(params=partitioner.place(warm(model, catalogue, partitioner.fetch(state.params))))
  state, progress = fit(
    plan,
    state,
    shared,
    make_recommender_step(model, optimizer, accumulation=r.accumulation),
    training_batches(config, split.train),
    partitioner=partitioner,
    directory=workdir / "checkpoints" / "recommender",
    log=log,
  )
  started = time.monotonic()
  rankings = {
    part + suffix: rank(state.params, split.history(part), targets, exclude_history=bool(suffix))
    for suffix in ("", WITHOUT_HISTORY)
    for part, targets in (("validation", split.validation_target), ("test", split.test_target))
  }
  progress["evaluation_seconds"] += time.monotonic() - started
  ranks: dict[str, Any] = {name: ranking.ranks for name, ranking in rankings.items()}
  if processes.is_first():
    np.savez(workdir / "ranks.npz", **ranks)
  return {name: ranking.metrics for name, ranking in rankings.items()}, progress
