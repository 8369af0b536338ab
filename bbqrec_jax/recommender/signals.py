"""What several signals of a candidate say together: a small network on top of all scores (this project's choice).

    score[i] += direct . z[i] + output . relu(hidden z[i] + bias)

z are a candidate's signals, standardised: what the base and the similarity tables make of it, how often it stands with
the items of the history, how often it follows the last of them or comes before it, how many rare words its title and
theirs share, how popular it is, at all and of late, and whether it is in the history. A sum of tables cannot say that
one signal counts for less where another is strong; this can. Like the tables the network is fitted on transitions that
the base has not seen, and adds nothing before that.
"""

import functools
from collections.abc import Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from bbqrec_jax.data.co_occurrence import NEXT, PREVIOUS, TOGETHER, co_occurrence
from bbqrec_jax.data.interactions import Interactions
from bbqrec_jax.data.title_words import similar_titles
from bbqrec_jax.ops.candidate_similarity import strength_scores

SIGNALS = ("scores", "base", "together", "next", "previous", "titles", "popularity", "endings", "seen")
_DECAY = 0.8  # Of what an item of the history counts, from each to the one before it.


@flax.struct.dataclass
class SignalSources:
  """What signals are read from.

  Attributes:
    neighbours: by relation ("together", "next", "previous", "titles"): [N, K] int32, -1 fills.
    strengths: of these, [N, K] float32.
    popularity: [N] float32, log(1 + interactions in training).
    endings: [N] float32, log(1 + training histories that end with the item), which is what is popular of late.
  """

  neighbours: dict[str, jax.Array]
  strengths: dict[str, jax.Array]
  popularity: jax.Array
  endings: jax.Array


def build_sources(histories: Interactions, *, num_items: int, count: int, titles: Sequence[str] = ()) -> SignalSources:
  """The sources of training histories and titles [N], if there are any, with `count` neighbours of each item."""
  neighbours, strengths = {}, {}
  for name, pairs in (("together", TOGETHER), ("next", NEXT), ("previous", PREVIOUS)):
    near, strength = co_occurrence(histories, num_items=num_items, count=min(count, num_items), pairs=pairs)
    # Counts of what follows directly are small, and of very different items.
    neighbours[name] = jnp.asarray(near)
    strengths[name] = jnp.asarray(strength if name == "together" else np.sqrt(strength))
  near, likeness = _similar_titles(tuple(titles) or ("",) * num_items, min(count, num_items))
  neighbours["titles"], strengths["titles"] = jnp.asarray(near), jnp.asarray(likeness)
  last = histories.items[histories.offsets[1:][histories.lengths > 0] - 1]
  popularity, endings = (
    jnp.asarray(np.log1p(np.bincount(items, minlength=num_items)).astype(np.float32))
    for items in (histories.items, last)
  )
  return SignalSources(neighbours, strengths, popularity, endings)


@functools.lru_cache(maxsize=1)
def _similar_titles(titles: tuple[str, ...], count: int) -> tuple[np.ndarray, np.ndarray]:
  """`similar_titles`, once for both models of a run: a million titles take minutes."""
  return similar_titles(titles, count=count)


def signals(
  sources: SignalSources,
  recent: jax.Array,
  scores: jax.Array,
  base: jax.Array,
  *,
  last_items: int,
  items: jax.Array | None = None,
) -> list[jax.Array]:
  """The `SIGNALS` of candidates.

  Args:
    sources: of the catalogue.
    recent: [B, T] int, the distinct items of each history, the latest first; -1 fills.
    scores: [B, n] of the candidates so far.
    base: [B, n], their log-probabilities by the base.
    last_items: R, that are looked at.
    items: [B, n] int candidates, or None for all N.

  Returns:
    [B, n] or [B, N] float32 each.
  """
  decay = _DECAY ** jnp.arange(min(last_items, recent.shape[1]), dtype=jnp.float32)
  weights = {"together": decay, "next": decay[:1], "previous": decay[:1], "titles": decay}
  related = [
    strength_scores(sources.neighbours[name], sources.strengths[name], weight, recent[:, : len(weight)], items)
    for name, weight in weights.items()
  ]
  known = (sources.popularity, sources.endings)
  if items is None:
    of_items = [jnp.broadcast_to(numbers, base.shape) for numbers in known]
    rows = jnp.arange(recent.shape[0], dtype=jnp.int32)[:, None]
    places = jnp.where(recent < 0, base.shape[1], recent)
    seen = jnp.zeros(base.shape, jnp.float32).at[rows, places].set(1.0, mode="drop")
  else:
    of_items = [numbers[items] for numbers in known]
    seen = jnp.any(items[:, :, None] == recent[:, None, :], axis=-1).astype(jnp.float32)
  return [scores, base, *related, *of_items, seen]


def network_shapes(units: int) -> dict[str, tuple[int, ...]]:
  """The shapes of `network`'s parameters, by name."""
  count = len(SIGNALS)
  standard = {"signal_mean": (count,), "signal_scale": (count,)}
  return standard | {"direct": (count,), "hidden": (count, units), "bias": (units,), "output": (units,)}


def no_network(units: int) -> dict[str, jax.Array]:
  """Parameters of a network that adds nothing."""
  return {name: jnp.zeros(shape, jnp.float32) for name, shape in network_shapes(units).items()}


def is_fitted(params: Mapping[str, jax.Array]) -> jax.Array:
  """Whether the network adds anything, bool []."""
  return jnp.any(params["direct"] != 0) | jnp.any(params["output"] != 0)


def network(params: Mapping[str, jax.Array], values: Sequence[jax.Array]) -> jax.Array:
  """What is added to scores for the candidates' signals, each [...] float32, unit by unit, so that one array is there.

  Args:
    params: as `network_shapes` has them.
    values: as `signals` gives them.
  """
  z = [(value - params["signal_mean"][i]) * params["signal_scale"][i] for i, value in enumerate(values)]

  def product(weights: jax.Array) -> jax.Array:
    return sum((weights[i] * part for i, part in enumerate(z)), start=jnp.zeros((), jnp.float32))

  total = product(params["direct"])
  for unit in range(params["output"].shape[0]):
    total = total + params["output"][unit] * jax.nn.relu(product(params["hidden"][:, unit]) + params["bias"][unit])
  return total
