"""Stage 2 from histories and semantic IDs to a trained recommender."""

import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.interactions import Interactions, Split, hold_out_last
from bbqrec_jax.errors import InputError
from bbqrec_jax.layers.padding import without_padding
from bbqrec_jax.ops.randomness import base_key
from bbqrec_jax.ops.ranking import LARGEST_CUTOFF
from bbqrec_jax.recommender.catalogue import Catalogue
from bbqrec_jax.recommender.evaluate import (
  Ranking,
  chosen_users,
  evaluate,
  make_ranker,
  rank_held_out,
  sample_users,
)
from bbqrec_jax.recommender.fit_similarity import fit_similarity
from bbqrec_jax.recommender.items import build_catalogue, item_features
from bbqrec_jax.recommender.model import SequenceModel
from bbqrec_jax.recommender.schedule import batch_rows, ranking_shapes, training_batches, training_plan
from bbqrec_jax.recommender.settings import RecommenderSettings
from bbqrec_jax.recommender.step import RecommenderState, make_recommender_step
from bbqrec_jax.recommender.two_towers import make_recommender
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.training.logging import MetricsLog
from bbqrec_jax.training.loop import Plan, compiled_step, fit
from bbqrec_jax.training.optimizer import make_optimizer
from bbqrec_jax.training.partitioning import Partitioner, StepFunction, made_on_host
from bbqrec_jax.training.settings import Safeguards
from bbqrec_jax.training.state import TrainState
from bbqrec_jax.utils import processes
from bbqrec_jax.utils.files import is_given, is_url, local_path
from bbqrec_jax.utils.json_files import read_json, write_json
from bbqrec_jax.utils.messages import say, warn

# Training begins with this share of earlier parameters, the rest are fresh ones. With more it ends sooner; with half of
# the held-out base the result was worse, too.
_KEPT_OF_EARLIER_RUN, _KEPT_OF_HELD_OUT = 0.5, 0.2
_FEWEST_USERS = 2048  # With a new transition, for which tables are fitted anew: fewer tell less than the earlier ones.


def tokenizer_folder(config: Any, workdir: pathlib.Path) -> pathlib.Path:
  """Where a run's semantic IDs are: its own, or those that its config names."""
  artefact = config.tokenizer.artefact
  if artefact and is_url(artefact):
    return local_path(artefact, flag="config.tokenizer.artefact", use="read")
  return pathlib.Path(artefact) if artefact else workdir / "tokenizer"


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
  config: Any,
  ids: SemanticIds | None,
  histories: Interactions,
  *,
  num_items: int,
  features: dict[str, np.ndarray] | None = None,
  titles: Sequence[str] = (),
) -> tuple[SequenceModel, Catalogue]:
  """The model, and the catalogue it reads; the arguments are those of `build_catalogue`."""
  catalogue, settings = build_catalogue(config, ids, histories, num_items=num_items, features=features, titles=titles)
  return make_recommender(settings), catalogue


def initial_state(config: Any, model: SequenceModel, catalogue: Catalogue, *, total_steps: int) -> RecommenderState:
  """The state before the first of so many steps; of the catalogue the shapes are enough."""
  example = {name: jnp.zeros((1, 2), jnp.int32) for name in ("items", "targets", "segments", "positions", "times")}
  if not model.settings.packed:
    example["targets"] = jnp.zeros(1, jnp.int32)
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (catalogue, example))
  params = model.lazy_init(base_key(config.seed), *shapes)["params"]
  optimizer = make_optimizer(config.recommender.optimizer, total_steps=total_steps)
  trained = jax.tree.map(jnp.copy, params) if model.settings.average else None
  return RecommenderState.create(params, optimizer, seed=config.seed, trained=trained)


def held_out(config: Any, split: Split, *, among: np.ndarray | None = None) -> tuple[Split, np.ndarray]:
  """The transitions that candidate similarity is fitted on, kept from everything that is trained before it.

  Args:
    config: of the run.
    split: of its data.
    among: [U] bool, the users whose transitions may be taken; None: all.

  Returns:
    As `hold_out_last`.
  """
  return hold_out_last(split, count=config.recommender.candidate_similarity.users, seed=config.seed, among=among)


class WarmStart(NamedTuple):
  """What a run that begins from an earlier one's recommender takes from it.

  Attributes:
    grow: (model, its catalogue, fresh parameters on the host) -> the earlier parameters for its items, likewise.
    unseen: [U] bool, the users whose last training transition the earlier run has not learned from.
  """

  grow: Callable[[SequenceModel, Catalogue, Any], Any]
  unseen: np.ndarray


class _Programs(NamedTuple):
  """A model and what is compiled for it: once, though it is trained twice.

  Attributes:
    model: the recommender.
    step: as `fit` takes it.
    ranker: a compiled `make_ranker`.
  """

  model: SequenceModel
  step: StepFunction
  ranker: Callable[[Any, Any, Any], Any]


class _Work(NamedTuple):
  """Where a run's stages work, as for `fit`, and what they share.

  Attributes:
    workdir: of the run.
    partitioner: how steps meet devices.
    log: for metrics.
    whole: the run's split, from which batches have their shapes.
    programs: the recommender's settings -> what is compiled for it.
  """

  workdir: pathlib.Path
  partitioner: Partitioner
  log: MetricsLog
  whole: Split
  programs: Callable[[RecommenderSettings], _Programs]


def _programs(config: Any, partitioner: Partitioner) -> Callable[[RecommenderSettings], _Programs]:
  """The field of `_Work`."""
  optimizer = make_optimizer(config.recommender.optimizer, total_steps=0)  # The length is in the state.

  @functools.cache
  def of(settings: RecommenderSettings) -> _Programs:
    model = make_recommender(settings)
    step = make_recommender_step(model, optimizer, accumulation=config.recommender.accumulation)
    ranker = partitioner.compile_map(make_ranker(model, beam_width=config.evaluation.beam_width))
    return _Programs(model, compiled_step(step, Safeguards.of(config), partitioner), ranker)

  return of


class _Stage(NamedTuple):
  """What `_trained` trains: its name, its data, and how it ranks.

  Attributes:
    name: of the stage, in logs and of its checkpoints' folder.
    model: the recommender.
    step: its training step.
    catalogue: what it is told of the items.
    shared: the same, placed.
    rank: (parameters, histories, targets, **options of `evaluate`) -> the ranking.
  """

  name: str
  model: SequenceModel
  step: StepFunction
  catalogue: Catalogue
  shared: Any
  rank: Callable[..., Ranking]


def _stage(
  name: str,
  config: Any,
  ids: SemanticIds | None,
  split: Split,
  dataset: Dataset,
  work: _Work,
) -> _Stage:
  """Makes the model and what it is told of the items."""
  with made_on_host():
    features = item_features(config, dataset.store)
    catalogue, settings = build_catalogue(
      config, ids, split.train, num_items=dataset.num_items, features=features, titles=dataset.titles
    )
  model, step, ranker = work.programs(settings)
  shared = work.partitioner.place(catalogue)
  common = {"num_items": catalogue.num_items, **ranking_shapes(config, work.whole, exact=model.exact)}

  def rank(params: Any, histories: Interactions, targets: np.ndarray, **options: Any) -> Ranking:
    return evaluate(ranker, params, shared, histories, targets, **common, **options)

  return _Stage(name, model, step, catalogue, shared, rank)


def _trained(
  stage: _Stage,
  config: Any,
  split: Split,
  dataset: Dataset,
  users: np.ndarray,
  work: _Work,
  *,
  first: RecommenderState | None = None,
) -> tuple[TrainState, dict[str, Any]]:
  """Trains a stage on the split's training histories, or goes on with it; picks the best by the users' NDCG@10.

  Args:
    stage: see there.
    config: of the run.
    split: its histories, and what follows them.
    dataset: for the ids of items.
    users: who is ranked.
    work: see there.
    first: the state to start from, placed; None: a fresh one.
  """
  r = config.recommender
  steps, evaluate_every = training_plan(r, split.train)
  shown = split.history("validation")
  plan = Plan(
    name=stage.name,
    steps=steps,
    log_every=config.log_every,
    steps_per_call=config.steps_per_call,
    evaluate_every=evaluate_every,
    evaluate=lambda state: stage.rank(state.params, shown, split.validation_target, users=users).metrics,
    select="ndcg@10",
    patience=r.patience,
    item_ids=dataset.item_ids,
    safeguards=Safeguards.of(config),
  )
  if first is None:
    first = work.partitioner.create(lambda: initial_state(config, stage.model, stage.catalogue, total_steps=steps))
  return fit(
    plan,
    first,
    stage.shared,
    stage.step,
    training_batches(config, split.train, shaped_by=work.whole.train, num_devices=work.partitioner.num_devices),
    partitioner=work.partitioner,
    directory=work.workdir / "checkpoints" / stage.name,
    log=work.log,
  )


def _starting_from(params: Any, state: RecommenderState, partitioner: Partitioner) -> RecommenderState:
  """A first state with other parameters, which are on the host."""
  trained = None if state.trained is None else partitioner.place(params)
  return state.replace(params=partitioner.place(params), trained=trained)  # type: ignore[attr-defined]


def _fitted_tables(
  config: Any,
  ids: SemanticIds | None,
  split: Split,
  dataset: Dataset,
  work: _Work,
  warm: WarmStart | None,
) -> tuple[Any, Any, dict[str, Any] | None]:
  """Tables that are fitted on some users' last training transitions, which the base beneath them was trained without.

  An earlier run's recommender is such a base as it is, of what came after it.

  Returns:
    (parameters of `CandidateSimilarity`, parameters of the base, both on the host, the progress record of the base's
    training, None without any).
  """
  e = config.evaluation
  held, users = held_out(config, split, among=None if warm is None else warm.unseen)
  stage = _stage("held_out", config, ids, held, dataset, work)
  progress = None
  if warm is None:
    some = users if not e.validation_users else chosen_users(users, e.validation_users, seed=config.seed)
    state, progress = _trained(stage, config, held, dataset, some, work)
    base = state.params
  else:
    first = work.partitioner.create(lambda: initial_state(config, stage.model, stage.catalogue, total_steps=1))
    grown = warm.grow(stage.model, stage.catalogue, work.partitioner.fetch(first.params))
    if len(users) < _FEWEST_USERS:
      say(f"candidate similarity: {len(users):,} users have a new transition: the earlier tables stay")
      return grown["candidate_similarity"], grown, None
    base = work.partitioner.place(grown)
  path = work.workdir / "candidate_similarity.json"
  if is_given(path):
    tables = read_json(path)["parameters"]
  else:
    say("candidate similarity: fitting its tables on the transitions held out")
    started = time.monotonic()
    shapes = ranking_shapes(config, work.whole, exact=stage.model.exact)
    del shapes["width"]  # Nothing is left out.
    fitted, losses = fit_similarity(
      base, stage.model, stage.shared, stage.catalogue, held.train, held.validation_target,
      users=users, seed=config.seed, partitioner=work.partitioner, **shapes,
    )  # fmt: skip
    seconds = time.monotonic() - started
    steps = " -> ".join(f"{loss:.3f}" for loss in losses.values())
    say(f"candidate similarity: done in {seconds:.0f} s, loss {steps}")
    tables = {name: np.asarray(part, np.float64).tolist() for name, part in fitted.items()}
    write_json(path, {"parameters": tables, "losses": losses, "seconds": seconds})
  tables = {name: np.asarray(part, np.float32) for name, part in tables.items()}
  return tables, work.partitioner.fetch(base), progress


def run_recommender(
  config: Any,
  ids: SemanticIds | None,
  split: Split,
  dataset: Dataset,
  *,
  workdir: pathlib.Path,
  partitioner: Partitioner,
  log: MetricsLog,
  warm: WarmStart | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
  """Trains the recommender (or goes on with it), picks it by validation NDCG@10, ranks the test items once.

  Where candidates are compared with the history, a base is trained first without each user's last training transition,
  and the tables are fitted on these. They are part of the model from the start, which is then trained on all. With
  `warm` an earlier run's recommender is that base.

  Training begins between the base's parameters and fresh ones: it ends sooner than from fresh ones, and from where
  training ended little would be learned from what is new ("shrink and perturb", Ash & Adams, 2020).

  The rank of each user's validation and test item, in the order of the users, goes into `workdir/ranks.npz`.

  Returns:
    ({"validation": metrics, "test": metrics} of the best model on all users, and the same with `WITHOUT_HISTORY` after
    the names, where no user's own history is ranked; the loop's progress record).
  """
  config = config.copy_and_resolve_references()
  config.recommender.batch_rows = batch_rows(config.recommender, split.train)  # Of what is held out from it, too.
  e = config.evaluation
  work, tables, base, before = _Work(workdir, partitioner, log, split, _programs(config, partitioner)), None, None, None
  if config.recommender.candidate_similarity.streams:
    # First: the devices hold one model at a time.
    tables, base, before = _fitted_tables(config, ids, split, dataset, work, warm)
  stage = _stage("recommender", config, ids, split, dataset, work)
  if not stage.model.exact and e.beam_width < min(LARGEST_CUTOFF, stage.catalogue.num_items):
    warn(
      f"config field evaluation.beam_width = {e.beam_width}: what stands further back counts as a miss, so figures at"
      f" higher cutoffs, up to {LARGEST_CUTOFF}, are too low"
    )
  steps, _ = training_plan(config.recommender, split.train)
  first = partitioner.create(lambda: initial_state(config, stage.model, stage.catalogue, total_steps=steps))
  if warm is not None or base is not None:
    fresh = partitioner.fetch(first.params)
    base = warm.grow(stage.model, stage.catalogue, fresh) if base is None and warm is not None else base
    kept = _KEPT_OF_HELD_OUT if warm is None else _KEPT_OF_EARLIER_RUN
    params = jax.tree.map(lambda old, new: (kept * old + (1 - kept) * new).astype(new.dtype), base, fresh)
    first = _starting_from(params if tables is None else {**params, "candidate_similarity": tables}, first, partitioner)
  users = sample_users(split, e.validation_users, seed=config.seed)
  state, progress = _trained(stage, config, split, dataset, users, work, first=first)
  started = time.monotonic()
  rankings = rank_held_out(functools.partial(stage.rank, state.params), split)
  progress["evaluation_seconds"] += time.monotonic() - started
  for kind in ("training", "evaluation", "checkpoint"):
    progress[f"{kind}_seconds"] += before[f"{kind}_seconds"] if before else 0.0
  progress["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(without_padding, state.params)))
  ranks: dict[str, Any] = {name: ranking.ranks for name, ranking in rankings.items()}
  if processes.is_first():
    np.savez(workdir / "ranks.npz", **ranks)
  return {name: ranking.metrics for name, ranking in rankings.items()}, progress
