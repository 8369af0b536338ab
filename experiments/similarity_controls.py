"""What candidate similarity is worth in a finished run, by part, and beside controls.

    bbqrec train --config=dense --data=DIR --workdir=runs/dense
    python experiments/similarity_controls.py --workdir=runs/dense

Nothing but tables is trained. For every variant of the tables all test users are ranked by the same base, and its test
Recall@10 and NDCG@10 stand beside what it has over the base alone, user by user, with the 95 % interval over users:

- the run's own tables, and those without one of their streams, or with the place of the last item alone;
- tables fitted on the validation targets in place of transitions held out from training: a control, which a run never
  does. It is what is there to be had, by the same numbers of tables and users.
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
from bbqrec_jax.recommender.candidate_similarity import stream_vectors
from bbqrec_jax.recommender.evaluate import evaluate, make_ranker
from bbqrec_jax.recommender.fit_similarity import fit_similarity
from bbqrec_jax.recommender.items import item_features
from bbqrec_jax.recommender.train import bucket_bounds
from bbqrec_jax.runs.compare import table
from bbqrec_jax.runs.restore import Restored, restore
from bbqrec_jax.training.partitioning import SingleDevice


def variants(tables: Any, names: list[str]) -> Iterator[tuple[str, Any]]:
  """The run's tables, whole and in parts; `names` are of the streams of vectors."""
  yield "the run's own", tables
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


def fitted_on_validation(run: Restored, split: Split, bounds: tuple[int, ...]) -> Any:
  """Tables fitted on the validation targets of as many users as a run's are."""
  config = run.config
  users = np.arange(split.train.num_users)
  most = config.recommender.candidate_similarity.users
  if len(users) > most:
    users = np.sort(np.random.default_rng([config.seed, 11]).choice(users, most, replace=False))
  fitted, _ = fit_similarity(
    run.params, run.model, run.catalogue, run.catalogue, split.history("validation"), split.validation_target,
    users=users, seed=config.seed, batch_size=config.evaluation.batch_size, max_length=config.recommender.max_length,
    bounds=bounds, partitioner=SingleDevice(),
  )  # fmt: skip
  return fitted


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
  ranker = jax.jit(make_ranker(run.model, beam_width=config.evaluation.beam_width))
  catalogue = jax.tree.map(jnp.asarray, run.catalogue)

  def gains(tables: Any) -> tuple[dict[str, float], np.ndarray]:
    ranking = evaluate(
      ranker, run.params | {"candidate_similarity": tables}, catalogue, split.history("test"), split.test_target,
      batch_size=config.evaluation.batch_size, max_length=r.max_length, num_items=catalogue.num_items, bounds=bounds,
    )  # fmt: skip
    return ranking.metrics, np.where(ranking.ranks < 10, 1 / np.log2(ranking.ranks.astype(np.float64) + 2), 0.0)

  own = jax.device_get(run.params["candidate_similarity"])
  nothing = jax.tree.map(np.zeros_like, own) | {"scale": np.ones_like(own["scale"])}
  names = list(stream_vectors(settings, run.ids, item_features(config, run.dataset.store) or {}))
  metrics, base = gains(nothing)
  rows = [["tables", "test Recall@10", "NDCG@10", "NDCG@10 over none"],
          ["none", f"{metrics['recall@10']:.4f}", f"{metrics['ndcg@10']:.4f}", ""]]  # fmt: skip
  control = ("fitted on validation targets", fitted_on_validation(run, split, bounds))
  for name, tables in (*variants(own, names), control):
    metrics, found = gains(tables)
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
