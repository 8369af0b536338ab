"""What candidate similarity is worth in a finished run, by part, and beside controls.

    bbqrec train --config=dense --data=DIR --workdir=runs/dense
    python experiments/similarity_controls.py --workdir=runs/dense

Nothing but tables is trained. For every variant of the tables all test users are ranked by the same base, and its test
Recall@10 and NDCG@10 stand beside what it has over the base alone, user by user, with the 95 % interval over users:

- the run's own tables, and those without one of their streams, or with the place of the last item alone;
- tables fitted on the validation targets in place of transitions held out from training: a control, which a run never
  does. It is what is there to be had, by the same numbers of tables and users;
- as many numbers on the candidates' popularity, for each number of last items, in place of similarities, fitted on the
  same validation targets: a gain here would come of a better calibrated base, not of what is compared.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from bbqrec_jax.command_line import define_path, quiet_flags, show, start
from bbqrec_jax.data.interactions import Split
from bbqrec_jax.errors import InputError
from bbqrec_jax.layers.apply import apply
from bbqrec_jax.ops.ranking import user_ndcg
from bbqrec_jax.recommender.candidate_similarity import stream_vectors
from bbqrec_jax.recommender.evaluate import evaluate, make_ranker, rank_scores
from bbqrec_jax.recommender.fit_similarity import collect_candidates, fit_added, fit_similarity
from bbqrec_jax.recommender.items import item_features
from bbqrec_jax.recommender.model import SequenceModel
from bbqrec_jax.recommender.schedule import bucket_bounds
from bbqrec_jax.recommender.signals import no_network
from bbqrec_jax.runs.compare import table
from bbqrec_jax.runs.restore import Restored, restore
from bbqrec_jax.training.partitioning import SingleDevice


def variants(tables: Any, names: list[str]) -> Iterator[tuple[str, Any]]:
  """The run's network and tables, and these alone, whole and in parts; `names` are of the streams of vectors."""
  yield "the run's own", tables
  if "output" in tables:
    tables = tables | no_network(len(tables["output"]))
    yield "without the network", tables
  for index, name in enumerate(names):
    parts = np.array(tables["tables"])
    parts[index] = 0
    yield f"without {name}", tables | {"tables": parts}
  if "neighbour_table" in tables:
    yield "without behaviour", tables | {"neighbour_table": np.zeros_like(tables["neighbour_table"])}
  first = {name: np.array(part) for name, part in tables.items()}
  first["tables"][:, 1:] = 0
  if "neighbour_table" in first:
    first["neighbour_table"][1:] = 0
  yield "the last item alone", first


def validation(run: Restored, split: Split, bounds: tuple[int, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
  """Arguments of the fit on the validation targets of as many users as a run's tables are of."""
  config = run.config
  users = np.arange(split.train.num_users)
  most = config.recommender.candidate_similarity.users
  if len(users) > most:
    users = np.sort(np.random.default_rng([config.seed, 11]).choice(users, most, replace=False))
  return (split.history("validation"), split.validation_target), {
    "users": users, "batch_size": config.evaluation.batch_size, "max_length": config.recommender.max_length,
    "bounds": bounds, "partitioner": SingleDevice(),
  }  # fmt: skip


def popularity_buckets(counts: np.ndarray, num_buckets: int) -> np.ndarray:
  """Of items that occur so often [N] the bucket [N] int32 in 0..n - 1, of equally many interactions each."""
  order = np.argsort(counts, kind="stable")
  share = np.cumsum(counts[order]) / max(counts.sum(), 1)
  buckets = np.empty(len(counts), np.int32)
  buckets[order] = np.minimum(share * num_buckets, num_buckets - 1).astype(np.int32)
  return buckets


def of_popularity(table: jax.Array, buckets: jax.Array, recent: jax.Array, items: jax.Array) -> jax.Array:
  """What a table [R, n] adds to items [B, n] by their buckets [N], for histories of so many last items [B, R]."""
  row = jnp.clip(jnp.sum(recent >= 0, axis=1, dtype=jnp.int32), 1, table.shape[0]) - 1
  return table[row[:, None], buckets[items]]


def popularity_ranker(model: SequenceModel, table: jax.Array, buckets: jax.Array) -> Any:
  """As `make_ranker` for an exact head, with what a table says of popularity added to the scores."""

  def rank(params: Any, catalogue: Any, batch: Any) -> dict[str, jax.Array]:
    seen = model.seen(batch)
    states = apply(model, params, "last_states", catalogue, batch)
    scores = apply(model, params, "scores", catalogue, states, seen)
    every = jnp.arange(scores.shape[1], dtype=jnp.int32)[None]
    return rank_scores(scores + of_popularity(table, buckets, seen, every), batch["targets"])

  return jax.jit(rank)


def report(run: Restored) -> str:
  """The table.

  Raises:
    InputError: if the run has no candidate similarity.
  """
  config, settings = run.config, run.config.recommender.candidate_similarity
  if not settings.streams:
    raise InputError("--workdir: expected a run with candidate similarity, got one without any streams")
  split = run.split
  bounds, r = bucket_bounds(config.recommender, split.train), config.recommender
  by_tables = jax.jit(make_ranker(run.model, beam_width=config.evaluation.beam_width))
  catalogue = jax.tree.map(jnp.asarray, run.catalogue)

  def gains(tables: Any, ranker: Any = by_tables) -> tuple[dict[str, float], np.ndarray]:
    ranking = evaluate(
      ranker, run.params | {"candidate_similarity": tables}, catalogue, split.history("test"), split.test_target,
      batch_size=config.evaluation.batch_size, max_length=r.max_length, num_items=catalogue.num_items, bounds=bounds,
    )  # fmt: skip
    return ranking.metrics, user_ndcg(ranking.ranks)

  own = jax.device_get(run.params["candidate_similarity"])
  nothing = jax.tree.map(np.zeros_like, own) | {"scale": np.ones_like(own["scale"])}
  names = list(stream_vectors(settings, run.ids, item_features(config, run.dataset.store) or {}))
  metrics, base = gains(nothing)
  rows = [["tables", "test Recall@10", "NDCG@10", "NDCG@10 over none"],
          ["none", f"{metrics['recall@10']:.4f}", f"{metrics['ndcg@10']:.4f}", ""]]  # fmt: skip
  given, options = validation(run, split, bounds)
  fitted, _ = fit_similarity(run.params, run.model, catalogue, run.catalogue, *given, seed=config.seed, **options)
  tried = [*variants(own, names), ("fitted on validation targets", fitted)]
  rankers = {name: by_tables for name, _ in tried}
  if run.model.exact:
    counts = np.bincount(split.train.items, minlength=catalogue.num_items)
    buckets = jnp.asarray(popularity_buckets(counts, settings.num_buckets))
    candidates = collect_candidates(run.params, run.model, catalogue, *given, **options)
    zeros = jnp.zeros((settings.last_items, settings.num_buckets), jnp.float32)
    learned, _ = fit_added(
      {"table": zeros}, lambda params, streams, recent, items: of_popularity(params["table"], streams, recent, items),
      buckets, candidates, settings=settings, seed=config.seed,
    )  # fmt: skip
    tried.append(("popularity in place of similarity", nothing | {"scale": learned["scale"]}))
    rankers[tried[-1][0]] = popularity_ranker(run.model, learned["table"], buckets)
  for name, tables in tried:
    metrics, found = gains(tables, rankers[name])
    over = found - base
    interval = 1.96 * over.std(ddof=1) / np.sqrt(len(over))
    rows.append(
      [name, f"{metrics['recall@10']:.4f}", f"{metrics['ndcg@10']:.4f}", f"{over.mean():+.4f} ± {interval:.4f}"]
    )
  return table(rows)


def main(argv: list[str]) -> None:
  """Prints the table."""
  del argv
  options = quiet_flags()
  show(lambda: report(restore(options.workdir, data=options.data)))


if __name__ == "__main__":
  define_path("workdir", "Of a finished run.")
  define_path("data", "The folder of its data, where that has moved since.")
  flags.mark_flags_as_required(["workdir"])
  start(main)
