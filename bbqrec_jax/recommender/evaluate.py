"""Full-catalogue ranking of held-out items, for both heads and for popularity."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bbqrec_jax.data.interactions import Interactions, Split, distinct_items, nobodys_items, user_blocks
from bbqrec_jax.data.ranking import ranking_batches
from bbqrec_jax.layers.apply import apply
from bbqrec_jax.ops.ranking import MISS, ranking_metrics, ranks_in_list, target_ranks, without
from bbqrec_jax.recommender.catalogue import Catalogue
from bbqrec_jax.recommender.model import SequenceModel

WITHOUT_HISTORY = "_without_history"  # After the name of figures of a ranking that leaves out the user's history.
_COVERAGE_CUTOFF = 10


def make_ranker(model: SequenceModel, *, beam_width: int) -> Callable[[Any, Catalogue, Any], Any]:
  """The function that ranks one batch, ready to be compiled by a partitioner.

  Args:
    model: the recommender.
    beam_width: of a head that searches; a target outside the beam is a miss at every cutoff.

  Returns:
    (params, catalogue, batch) -> {"ranks": [B] int32, "top": [B, 10] int32}. Where the batch has `exclude` [B, E] int,
    these items are out of the ranking (-1 fills); a target among them is a miss.
  """

  def rank(params: Any, catalogue: Catalogue, batch: Any) -> dict[str, jax.Array]:
    exclude, seen = batch.get("exclude"), model.seen(batch)
    states = apply(model, params, "last_states", catalogue, batch)
    if not model.exact:
      beam = apply(model, params, "search", catalogue, states, width=beam_width, exclude=exclude, seen=seen)
      ranks = ranks_in_list(beam.items, beam.log_probs, batch["targets"])
      return {"ranks": ranks, "top": beam.items[:, :_COVERAGE_CUTOFF]}
    return rank_scores(apply(model, params, "scores", catalogue, states, seen), batch["targets"], exclude)

  return rank


def rank_scores(scores: jax.Array, targets: jax.Array, exclude: jax.Array | None = None) -> dict[str, jax.Array]:
  """What `make_ranker` gives, from the scores of all items [B, N]; targets [B], exclude [B, E] int, -1 fills."""
  if exclude is not None:
    scores = without(scores, exclude)
  ranks = target_ranks(scores, targets)
  best, top = jax.lax.top_k(scores, min(_COVERAGE_CUTOFF, scores.shape[1]))
  if exclude is not None:
    ranks = jnp.where(jnp.any(exclude == targets[:, None], axis=1), MISS, ranks)
    top = jnp.where(jnp.isneginf(best), -1, top)
  return {"ranks": ranks, "top": top}


def summarize(ranks: np.ndarray) -> dict[str, float]:
  """The metrics of ranks [U], each over all users."""
  metrics = ranking_metrics(jnp.asarray(ranks), jnp.ones(len(ranks), bool))
  return {name: float(total) / float(count) for name, (total, count) in metrics.items()}


class Ranking(NamedTuple):
  """What a model makes of some users.

  Attributes:
    metrics: Recall@{1,5,10,20}, NDCG@{5,10,20}, MRR, and `coverage@10`, the share of the catalogue in anybody's first
      ten.
    ranks: [n] int32 of each user's target, from 0; the largest int32 where a search missed it or it was left out.
  """

  metrics: dict[str, float]
  ranks: np.ndarray


def evaluate(
  ranker: Callable[[Any, Any, Any], Any],
  params: Any,
  shared: Any,
  histories: Interactions,
  targets: np.ndarray,
  *,
  batch_size: int,
  max_length: int,
  num_items: int,
  bounds: tuple[int, ...] = (),
  exclude_history: bool = False,
  width: int = 0,
  users: np.ndarray | None = None,
) -> Ranking:
  """Ranks the catalogue for every user, or for some.

  Args:
    ranker: a compiled `make_ranker`.
    params: the model's parameters.
    shared: what the ranker is given beside them.
    histories: the inputs.
    targets: [U] int, what really came next.
    batch_size: users at once.
    max_length: T.
    num_items: N, for the coverage.
    bounds: lengths, rising, each below T: users are ranked in groups, padded to the least that holds them.
    exclude_history: leave what is in a user's whole history out of the user's ranking, as `recommend` does.
    width: places for items that are left out, at least, filled where nothing is: rankings with the history and without
      it are then one program. 0: as many as there are.
    users: [n] int, who is ranked; None: all.
  """
  if users is None:
    users = np.arange(histories.num_users)
  ranks, seen = np.zeros(len(users), np.int32), np.zeros(num_items + 1, bool)
  exclude = distinct_items(histories) if exclude_history else nobodys_items(histories) if width else None
  for places, batch in ranking_batches(
    histories,
    targets,
    users=users,
    batch_size=batch_size,
    max_length=max_length,
    bounds=bounds,
    exclude=exclude,
    width=max(1, width),
  ):
    result = jax.device_get(ranker(params, shared, batch))
    ranks[places] = result["ranks"][: len(places)]
    seen[result["top"][: len(places)]] = True  # -1, a short beam's filling, is the row past the last item.
  return Ranking(summarize(ranks) | {f"coverage@{_COVERAGE_CUTOFF}": float(seen[:num_items].mean())}, ranks)


def rank_held_out(rank: Callable[..., Ranking], split: Split) -> dict[str, Ranking]:
  """Everybody's validation and test items ranked, each also `WITHOUT_HISTORY`.

  Args:
    rank: (histories, targets, exclude_history) -> the ranking.
    split: of the data.
  """
  return {
    part + suffix: rank(split.history(part), targets, exclude_history=bool(suffix))
    for suffix in ("", WITHOUT_HISTORY)
    for part, targets in (("validation", split.validation_target), ("test", split.test_target))
  }


def popularity_metrics(
  split: Split, targets: np.ndarray, *, num_items: int, histories: Interactions | None = None
) -> dict[str, float]:
  """The floor: the same ranking for everybody, by how often an item occurs in training; ties against the target.

  Args:
    split: counts are those of its training part.
    targets: [U] int, what really came next.
    num_items: N.
    histories: of the same users, each of whose items is left out of the user's own ranking; None leaves out none.
  """
  counts = np.bincount(split.train.items, minlength=num_items)
  ranks = num_items - np.searchsorted(np.sort(counts), counts[targets], side="left") - 1
  reached = np.arange(num_items) < _COVERAGE_CUTOFF
  if histories is not None:
    reached[:] = False
    own, places = distinct_items(histories), np.argsort(np.argsort(-counts, kind="stable"))
    for block in user_blocks(own):
      items, lengths = own.items[own.offsets[block.start] : own.offsets[block.stop]], own.lengths[block]
      users = np.repeat(np.arange(block.start, block.stop), lengths)
      before = (counts[items] >= counts[targets[users]]) & (items != targets[users])
      ranks[block] -= np.bincount(users[before] - block.start, minlength=len(lengths))
      ranks[users[items == targets[users]]] = MISS
      for mine in np.split(places[items], np.cumsum(lengths)[:-1]):
        reached[_first_left(mine, num_items=num_items)] = True
  return summarize(ranks.astype(np.int32)) | {f"coverage@{_COVERAGE_CUTOFF}": float(reached.sum()) / num_items}


def _first_left(places: np.ndarray, *, num_items: int) -> np.ndarray:
  """The first ten of N places without some [n]."""
  return np.setdiff1d(np.arange(min(_COVERAGE_CUTOFF + len(places), num_items)), places)[:_COVERAGE_CUTOFF]


def sample_users(split: Split, count: int, *, seed: int) -> np.ndarray:
  """Indices of `count` users of those with a validation target, drawn once and sorted; all where `count` is 0."""
  return chosen_users(np.arange(len(split.validation_target)), count, seed=seed)


def chosen_users(users: np.ndarray, count: int, *, seed: int) -> np.ndarray:
  """`count` of the users [n], ascending; all of them where `count` is 0 or no fewer."""
  if count == 0 or count >= len(users):
    return users
  return np.sort(np.random.default_rng(seed).choice(users, count, replace=False))
