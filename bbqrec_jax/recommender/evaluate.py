"""Full-catalogue ranking of held-out items, by any head and by popularity."""

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
    (params, catalogue, batch) -> {"ranks": [B] int32, "top": [B, 10] int32}; where the batch has `exclude` [B, E] int,
    these also without such items, see `with_and_without`.
  """

  def rank(params: Any, catalogue: Catalogue, batch: Any) -> dict[str, jax.Array]:
    targets, seen = batch["targets"], model.seen(batch)
    states = apply(model, params, "last_states", catalogue, batch)
    if model.exact:
      scores = apply(model, params, "scores", catalogue, states, seen)
      return with_and_without(lambda exclude: rank_scores(scores, targets, exclude), batch.get("exclude"))
    every = apply(model, params, "scores_of_all", catalogue, states, seen)

    def search(exclude: jax.Array | None) -> dict[str, jax.Array]:
      given = {"width": beam_width, "exclude": exclude, "seen": seen, "every": every}
      beam = apply(model, params, "search", catalogue, states, **given)
      ranks = ranks_in_list(beam.items, beam.log_probs, targets)
      return {"ranks": ranks, "top": beam.items[:, :_COVERAGE_CUTOFF]}

    return with_and_without(search, batch.get("exclude"))

  return rank


def with_and_without(
  rank: Callable[[jax.Array | None], dict[str, jax.Array]], exclude: jax.Array | None
) -> dict[str, jax.Array]:
  """A ranking of all items, and one in which some are left out.

  Args:
    rank: (items to leave out [B, E] int or None) -> `ranks` and `top`.
    exclude: [B, E] int, -1 fills; None: there is no other ranking.

  Returns:
    What it gives for None, and, under the same names followed by `WITHOUT_HISTORY`, for `exclude`. The second is zeros
    and costs nothing where no row of the batch leaves anything out.
  """
  if exclude is None:
    return rank(None)
  # A loop, so that what may be a search is compiled once.
  nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(rank, exclude))
  both = jnp.stack([jnp.full_like(exclude, -1), exclude])
  needed = jnp.array([True, False]) | jnp.any(exclude >= 0)

  def one(carry: None, given: tuple[jax.Array, jax.Array]) -> tuple[None, dict[str, jax.Array]]:
    return carry, jax.lax.cond(given[0], rank, lambda _: nothing, given[1])

  _, found = jax.lax.scan(one, None, (needed, both))
  kinds = enumerate(("", WITHOUT_HISTORY))
  return {name + kind: part[index] for index, kind in kinds for name, part in found.items()}


def rank_scores(scores: jax.Array, targets: jax.Array, exclude: jax.Array | None = None) -> dict[str, jax.Array]:
  """What `make_ranker` gives, from the scores of all items [B, N]; targets [B], exclude [B, E] int, -1 fills.

  A target among what is left out is a miss.
  """
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
    without_history: the same where what is in each user's whole history is left out, as `recommend` does.
  """

  metrics: dict[str, float]
  ranks: np.ndarray
  without_history: "Ranking | None" = None


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
  without_history: bool = False,
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
    without_history: rank `without_history`, too.
    width: places for items that are left out, at least, filled where nothing is: calls with such a ranking and without
      are then one program. 0: as many as there are.
    users: [n] int, who is ranked; None: all.
  """
  if users is None:
    users = np.arange(histories.num_users)
  kinds = ("", WITHOUT_HISTORY) if without_history else ("",)
  ranks = {kind: np.zeros(len(users), np.int32) for kind in kinds}
  reached = {kind: np.zeros(num_items + 1, bool) for kind in kinds}
  exclude = distinct_items(histories) if without_history else nobodys_items(histories) if width else None
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
    for kind in kinds:
      ranks[kind][places] = result["ranks" + kind][: len(places)]
      reached[kind][result["top" + kind][: len(places)]] = True  # -1, a short beam's filling, is past the last item.
  *more, whole = (_ranking(ranks[kind], reached[kind][:num_items]) for kind in reversed(kinds))
  return whole._replace(without_history=more[0] if more else None)


def _ranking(ranks: np.ndarray, reached: np.ndarray) -> Ranking:
  """Of the ranks of users, and of which items [N] bool anybody's first ten reach."""
  return Ranking(summarize(ranks) | {f"coverage@{_COVERAGE_CUTOFF}": float(reached.mean())}, ranks)


def rank_held_out(rank: Callable[..., Ranking], split: Split) -> dict[str, Ranking]:
  """Everybody's validation and test items ranked, each also `WITHOUT_HISTORY`.

  Args:
    rank: (histories, targets, without_history) -> the ranking.
    split: of the data.
  """
  whole = {
    part: rank(split.history(part), targets, without_history=True)
    for part, targets in (("validation", split.validation_target), ("test", split.test_target))
  }
  others = {part + WITHOUT_HISTORY: ranking.without_history for part, ranking in whole.items()}
  return whole | {part: ranking for part, ranking in others.items() if ranking is not None}


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
