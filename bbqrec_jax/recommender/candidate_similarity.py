"""What the similarity of a candidate to the last items of a history adds to its score (this project's choice).

The paper compares the items of a history with one another, in attention; here the candidate is compared with them:

    score[i] = scale * base score[i] + sum over streams and places of table[stream, place, bucket(similarity)]

The tables are a few hundred numbers. They start at zero, which leaves the model as it is, and are fitted after the
base, on transitions that it was not trained on: of others the base knows by heart what the tables could tell it. A
small network on top of them weighs them against other signals, see `signals`.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bbqrec_jax.data.co_occurrence import co_occurrence, strength_buckets
from bbqrec_jax.data.interactions import Interactions
from bbqrec_jax.ops.candidate_similarity import neighbour_scores, principal_axes, tail_edges, unit_rows, vector_scores
from bbqrec_jax.ops.ranking import without
from bbqrec_jax.recommender.catalogue import CandidateStreams
from bbqrec_jax.recommender.settings import (
  CandidateSimilaritySettings,
  RecommenderSettings,
  has_network,
  parts_of,
  reads_titles,
)
from bbqrec_jax.recommender.signals import build_sources, is_fitted, network, network_shapes, signals
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.semantic_ids.beam import BeamResult

_RELATED = 50  # Neighbours of an item that signals are read from.


class CandidateSimilarity(nn.Module):
  """The tables, the factors of the base's scores, and the network of signals.

  Attributes:
    settings: of the recommender.
  """

  settings: RecommenderSettings

  def setup(self) -> None:
    """Makes the parameters: factors of one, tables of zeros."""
    s, zeros = self.settings.candidate_similarity, nn.initializers.zeros
    self.scale = self.param("scale", nn.initializers.ones, (len(parts_of(self.settings)[1]),), jnp.float32)
    shape = (self.settings.candidate_vectors, s.last_items, s.num_buckets + 2)
    self.tables = self.param("tables", zeros, shape, jnp.float32)
    self.neighbour_table: jax.Array | None = None
    if "behaviour" in s.streams:
      self.neighbour_table = self.param("neighbour_table", zeros, (s.last_items, s.num_buckets), jnp.float32)
    shapes = network_shapes(s.network_units) if has_network(s) else {}
    self.network_params = {name: self.param(name, zeros, shape, jnp.float32) for name, shape in shapes.items()}

  def touch(self) -> None:
    """Makes the parameters, for `init`: the loss of the base does not need them."""

  def __call__(self, streams: CandidateStreams, recent: jax.Array, items: jax.Array | None = None) -> jax.Array:
    """What is added to scores.

    Args:
      streams: of the catalogue.
      recent: [B, T] int, the distinct items of each history, the latest first; -1 fills.
      items: [B, n] int candidates, or None for all.

    Returns:
      [B, n] or [B, N] float32. Over all items tables of zeros cost nothing, and get no gradient.
    """
    if items is not None:
      return self._added(streams, recent, items)
    fitted = jnp.any(self.tables != 0)
    if self.neighbour_table is not None:
      fitted |= jnp.any(self.neighbour_table != 0)
    nothing = jnp.zeros((recent.shape[0], streams.num_items), jnp.float32)
    return jax.lax.cond(fitted, lambda: self._added(streams, recent, None), lambda: nothing)

  @nn.nowrap
  def _added(self, streams: CandidateStreams, recent: jax.Array, items: jax.Array | None) -> jax.Array:
    """See `__call__`."""
    count = min(self.settings.candidate_similarity.last_items, recent.shape[1])
    recent, parts = recent[:, :count], []
    for index, unit in enumerate(streams.vectors):
      table = self.tables[index, :count].astype(jnp.float32)
      parts.append(vector_scores(unit, streams.edges[index], table, recent, items))
    if self.neighbour_table is not None:
      assert streams.neighbours is not None
      assert streams.buckets is not None
      table = self.neighbour_table[:count].astype(jnp.float32)
      parts.append(neighbour_scores(streams.neighbours, streams.buckets, table, recent, items))
    return sum(parts[1:], start=parts[0])

  def scores(
    self,
    streams: CandidateStreams,
    recent: jax.Array,
    base: jax.Array,
    added: jax.Array,
    items: jax.Array | None = None,
  ) -> jax.Array:
    """Scores of candidates.

    Args:
      streams: of the catalogue.
      recent: as in `__call__`, and so are the items.
      base: [B, n] or [B, N], the scores of the last base, whose softmax is over the catalogue.
      added: what `__call__` gives for them.
      items: candidates, or None for all.

    Returns:
      [B, n] or [B, N] float32.
    """
    total = self.scale[-1] * base + added
    if not self.network_params:
      return total
    return jax.lax.cond(
      is_fitted(self.network_params),
      lambda: total + network(self.network_params, self.signals(streams, recent, base, added, items)),
      lambda: total,
    )

  @nn.nowrap
  def signals(
    self,
    streams: CandidateStreams,
    recent: jax.Array,
    base: jax.Array,
    added: jax.Array,
    items: jax.Array | None,
  ) -> list[jax.Array]:
    """The signals of candidates, as `signals.signals` gives them; the arguments are those of `scores`."""
    assert streams.signals is not None
    if items is None:
      base = jax.nn.log_softmax(base, axis=-1)
    last_items = self.settings.candidate_similarity.last_items
    total = self.scale[-1] * base + added
    return signals(streams.signals, recent, total, base, last_items=last_items, items=items)


def stream_vectors(
  settings: CandidateSimilaritySettings, ids: SemanticIds | None, features: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """The vectors [N, d] of each stream of vectors, by its name.

  Args:
    settings: which.
    ids: semantic IDs of the items, where streams are of their codes.
    features: of each modality, standardised, [N, D].
  """
  chosen = {f"features of {name}": rows for name, rows in features.items()} if "features" in settings.streams else {}
  if ids is not None:
    names = (*(ids.modalities if "modalities" in settings.streams else ()), *({"fused"} & set(settings.streams)))
    chosen |= {name: ids.vectors(name) for name in names}
  return chosen


def build_streams(
  settings: CandidateSimilaritySettings,
  ids: SemanticIds | None,
  features: dict[str, np.ndarray],
  histories: Interactions,
  *,
  num_items: int,
  seed: int,
  titles: Sequence[str] = (),
) -> CandidateStreams:
  """What candidates are compared by.

  Args:
    settings: which streams.
    ids: see `stream_vectors`, and so are the features.
    features: see there.
    histories: of training; items that are not there, which came later, have no part in the edges.
    num_items: N.
    seed: of the pairs that edges are fitted on.
    titles: of the items, [N]; () where there are none.
  """
  known = np.unique(histories.items)
  vectors = stream_vectors(settings, ids, features)
  if settings.width:
    vectors = {name: _narrowed(rows, known, width=settings.width) for name, rows in vectors.items()}
  edges = [tail_edges(rows[known], settings.num_buckets, seed=seed) for rows in vectors.values()]
  neighbours = buckets = sources = None
  if has_network(settings):
    read = titles if reads_titles(settings) else ()
    sources = build_sources(histories, num_items=num_items, count=_RELATED, titles=read)
  if "behaviour" in settings.streams:
    near, strengths = co_occurrence(histories, num_items=num_items, count=min(settings.neighbours, num_items))
    neighbours, buckets = jnp.asarray(near), jnp.asarray(strength_buckets(strengths, settings.num_buckets))
  return CandidateStreams(
    vectors=tuple(jnp.asarray(unit_rows(rows)) for rows in vectors.values()),
    edges=jnp.asarray(np.stack(edges) if edges else np.zeros((0, settings.num_buckets - 1), np.float32)),
    neighbours=neighbours,
    buckets=buckets,
    signals=sources,
  )


def _narrowed(vectors: np.ndarray, known: np.ndarray, *, width: int) -> np.ndarray:
  """Wider vectors [N, d] along the principal axes of those of known items [n]: [N, width], others as they are."""
  if vectors.shape[1] <= width:
    return vectors
  axes = principal_axes(vectors[known], width)
  return np.concatenate([rows.astype(np.float32) @ axes for rows in np.array_split(vectors, -(-len(vectors) // 2**14))])


def unless_in(items: jax.Array, others: jax.Array) -> jax.Array:
  """Items [B, n] with -1 in place of those that are among others [B, m]."""
  return jnp.where(jnp.any(items[:, :, None] == others[:, None, :], axis=-1), -1, items)


def most_similar(added: jax.Array, others: jax.Array, *, width: int, exclude: jax.Array | None) -> jax.Array:
  """The items that most is added to, of those that anything is, not among others [B, m]: [B, N] -> [B, width]."""
  if exclude is not None:
    added = without(added, exclude)
  most, items = jax.lax.top_k(added, min(width, added.shape[1]))
  return unless_in(jnp.where(most > 0, items, -1), others)


def rescored(items: jax.Array, base: jax.Array, scores: jax.Array, *, width: int) -> BeamResult:
  """The best `width` of items [B, n], -1 for none, by scores [B, n].

  The log-probabilities that come back are the scores, shifted so that they hold as much as the base's [B, n] did.
  """
  none = items < 0
  mass, of_scores = (jax.nn.logsumexp(jnp.where(none, -jnp.inf, part), axis=-1) for part in (base, scores))
  shift = jnp.where(jnp.isfinite(mass) & jnp.isfinite(of_scores), mass - of_scores, 0.0)
  best, order = jax.lax.top_k(jnp.where(none, -jnp.inf, scores + shift[:, None]), width)
  chosen = jnp.take_along_axis(items, order, axis=1)
  return BeamResult(items=jnp.where(jnp.isneginf(best), -1, chosen), log_probs=best)
