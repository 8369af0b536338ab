"""What needs no network: item-kNN and BPR of the library implicit, in this project's split, ranking and tables.

    pip install implicit
    python experiments/peers/baselines.py --data=DIR --output=runs/baselines
    bbqrec compare runs/baselines/*/* runs/sasrec --reference=item_knn

Each method's settings are chosen by validation NDCG@10 without the own history, which such scores put first, out of
those in `GRIDS`; the test items are ranked once. Every seed of a method leaves a folder as a run does,
OUTPUT/METHOD/SEED with `results.json` and `ranks.npz`. Item-kNN knows the whole history that it is given; BPR the
training histories alone, as it has no way to read another.
"""

import itertools
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.sparse
from absl import flags

from bbqrec_jax.command_line import define_path, quiet_flags, start
from bbqrec_jax.config import default_config
from bbqrec_jax.data.interactions import Interactions, Split, distinct_items
from bbqrec_jax.data.ranking import ranking_batches
from bbqrec_jax.data.sources import recognise_source
from bbqrec_jax.errors import InputError, refuse
from bbqrec_jax.recommender.evaluate import WITHOUT_HISTORY, Ranking, popularity_metrics, rank_scores, summarize
from bbqrec_jax.runs.run import read_data
from bbqrec_jax.runs.workdir import format_results
from bbqrec_jax.utils.files import check_new
from bbqrec_jax.utils.json_files import write_json

GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {
  "item_knn": {"neighbours": (20, 100, 500), "weighting": ("cosine", "tfidf", "bm25")},
  "bpr": {
    "factors": (64, 128),
    "learning_rate": (0.01, 0.05),
    "regularization": (0.001, 0.01),
    "iterations": (100, 300),
  },
}
Scorer = Callable[[Interactions], Callable[[np.ndarray], np.ndarray]]


def matrix(histories: Interactions, num_items: int) -> scipy.sparse.csr_matrix:
  """[U, N] float32, 1 where the user has the item."""
  owner = np.repeat(np.arange(histories.num_users), histories.lengths)
  table = scipy.sparse.csr_matrix(
    (np.ones(len(owner), np.float32), (owner, histories.items)), shape=(histories.num_users, num_items)
  )
  table.data[:] = 1.0
  return table


def item_knn(train: Interactions, num_items: int, *, neighbours: int, weighting: str, seed: int) -> Scorer:
  """Scores by the sum of the similarities to the items of a history."""
  from implicit import nearest_neighbours
  from implicit.utils import ParameterWarning

  warnings.filterwarnings("ignore", category=ParameterWarning)  # It turns its own matrices.
  del seed  # Nothing is drawn.
  kind = {"cosine": "CosineRecommender", "tfidf": "TFIDFRecommender", "bm25": "BM25Recommender"}[weighting]
  model = getattr(nearest_neighbours, kind)(K=neighbours, num_threads=1)
  model.fit(matrix(train, num_items), show_progress=False)
  similarity = scipy.sparse.csr_matrix(model.similarity)

  def scorer(histories: Interactions) -> Callable[[np.ndarray], np.ndarray]:
    rows = matrix(histories, num_items)
    return lambda users: np.asarray((rows[users] @ similarity).todense(), np.float32)

  return scorer


def bpr(train: Interactions, num_items: int, *, seed: int, **settings: Any) -> Scorer:
  """Scores by the product of a user's and an item's factors."""
  from implicit.bpr import BayesianPersonalizedRanking

  model = BayesianPersonalizedRanking(random_state=seed, num_threads=1, **settings)
  model.fit(matrix(train, num_items), show_progress=False)
  return lambda _: lambda users: np.asarray(model.user_factors[users] @ model.item_factors.T, np.float32)


METHODS: dict[str, Callable[..., Scorer]] = {"item_knn": item_knn, "bpr": bpr}


def choices(method: str) -> Iterator[dict[str, Any]]:
  """All settings of a method's grid."""
  grid = GRIDS[method]
  return (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))


def rank(scorer: Scorer, split: Split, part: str, *, num_items: int, without_history: bool) -> Ranking:
  """How every user's target of a part ranks."""
  histories, targets = split.history(part), {"validation": split.validation_target, "test": split.test_target}[part]
  score, users = scorer(histories), np.arange(histories.num_users)
  ranks, top = np.zeros(len(users), np.int32), np.zeros(num_items + 1, bool)
  exclude = distinct_items(histories) if without_history else None
  for places, batch in ranking_batches(histories, targets, users=users, batch_size=256, max_length=1, exclude=exclude):
    rows = np.resize(places, len(batch["targets"]))  # The last ones fill the batch.
    result = rank_scores(jnp.asarray(score(rows)), batch["targets"], batch.get("exclude"))
    ranks[places] = result["ranks"][: len(places)]
    top[result["top"][: len(places)]] = True
  return Ranking(summarize(ranks) | {"coverage@10": float(top[:num_items].mean())}, ranks)


def judge(method: str, split: Split, figures: dict[str, Any], output: pathlib.Path, *, seeds: list[int]) -> str:
  """Chooses the settings with the first seed, and judges every seed; the table of the last."""
  num_items, begin = figures["items"], time.monotonic()

  def validated(settings: dict[str, Any]) -> float:
    scorer = METHODS[method](split.train, num_items, seed=seeds[0], **settings)
    return float(rank(scorer, split, "validation", num_items=num_items, without_history=True).metrics["ndcg@10"])

  tried = [(validated(settings), settings) for settings in choices(method)]
  settings = max(tried, key=lambda one: one[0])[1]
  search = time.monotonic() - begin
  for seed in seeds:
    begin = time.monotonic()
    scorer = METHODS[method](split.train, num_items, seed=seed, **settings)
    trained = time.monotonic()
    rankings = {
      part + suffix: rank(scorer, split, part, num_items=num_items, without_history=bool(suffix))
      for suffix in ("", WITHOUT_HISTORY)
      for part in ("validation", "test")
    }
    folder = output / method / str(seed)
    folder.mkdir(parents=True)
    np.savez(folder / "ranks.npz", **{name: ranking.ranks for name, ranking in rankings.items()})
    popularity = {
      "popularity" + suffix: popularity_metrics(
        split, split.test_target, num_items=num_items, histories=split.history("test") if suffix else None
      )
      for suffix in ("", WITHOUT_HISTORY)
    }
    results = {
      "model": f"{method} {settings}",
      "data": {
        name: figures[name] for name in ("name", "source", "users", "items", "interactions", "split", "split_hash")
      },
      **popularity,
      **{name: ranking.metrics for name, ranking in rankings.items()},
      "tried": [{"ndcg@10": value, **one} for value, one in tried],
      "best_step": 1,
      "steps": 1,
      "skipped_steps": {"tokenizer": 0, "recommender": 0},
      "seconds": {
        "tokenizer": 0.0, "recommender": trained - begin, "evaluation": time.monotonic() - trained, "checkpoints": 0.0,
        "search": search,
      },
    }  # fmt: skip
    write_json(folder / "results.json", results)
  return format_results(results)


def main(argv: list[str]) -> None:
  """Prints the tables of all methods."""
  del argv
  options = quiet_flags()
  try:
    check_new(options.output)
    config = default_config()
    config.data.path, config.data.source = str(options.data), recognise_source(options.data)
    config.recommender.item_inputs, config.recommender.head = ("item",), "dense"
    config.recommender.similarity = config.recommender.candidate_similarity.streams = ()
    _, split, figures = read_data(config)
    for method in options.methods:
      if method not in METHODS:
        raise InputError(f"--methods: expected some of {', '.join(METHODS)}, got {method!r}")
      print(judge(method, split, figures, options.output, seeds=[int(seed) for seed in options.seeds]))
  except InputError as error:
    refuse(error)


if __name__ == "__main__":
  define_path("data", "The folder of a data set.")
  define_path("output", "Gets a folder METHOD/SEED for each.")
  flags.DEFINE_list("methods", list(METHODS), "Which.")
  flags.DEFINE_list("seeds", ["0", "1", "2"], "Of BPR; item-kNN draws nothing.")
  flags.mark_flags_as_required(["data", "output"])
  start(main)
