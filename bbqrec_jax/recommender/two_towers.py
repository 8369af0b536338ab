"""The hybrid recommender of two towers: one generates semantic IDs, the other has a full softmax."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bbqrec_jax.ops.ranking import without
from bbqrec_jax.recommender.candidate_similarity import CandidateSimilarity, unless_in
from bbqrec_jax.recommender.catalogue import Catalogue
from bbqrec_jax.recommender.model import Recommender, SequenceModel
from bbqrec_jax.recommender.parts import check_parts
from bbqrec_jax.recommender.settings import TOWERS, CandidateSimilaritySettings, RecommenderSettings
from bbqrec_jax.semantic_ids.beam import BeamResult, best_candidates

_OF_CODES = {"fused", "modalities"}  # Item inputs that the dense tower does without.
_NARROWER = 5  # Times fewer items of the beam than of the full softmax: wider ones found nothing better.


def make_recommender(settings: RecommenderSettings) -> SequenceModel:
  """The recommender that the settings describe: of one tower, or of two, see `TwoTowers`.

  Raises:
    InputError: if its head or its backbone cannot be made.
  """
  if settings.head not in TOWERS:
    check_parts(settings)
    return Recommender(settings)
  for tower in tower_settings(settings):
    check_parts(tower)
  return TwoTowers(settings)


def tower_settings(settings: RecommenderSettings) -> tuple[RecommenderSettings, RecommenderSettings]:
  """The generative tower is as the settings say, the dense one does without codes and has sizes of its own.

  Where it has no features, either, it is never made to do without items' own vectors.
  """
  first, second = TOWERS[settings.head]
  generative = dataclasses.replace(settings, head=first, candidate_similarity=CandidateSimilaritySettings())
  dense = dataclasses.replace(
    generative,
    head=second,
    item_inputs=tuple(name for name in settings.item_inputs if name not in _OF_CODES),
    num_columns=0,
    num_streams=0,
    width=settings.dense_tower.width,
    mlp_width=settings.dense_tower.mlp_width,
    dropout=settings.dense_tower.dropout,
    item_dropout=settings.item_dropout if settings.feature_width else 0.0,
  )
  return generative, dense


class TwoTowers(SequenceModel):
  """The generative and the dense head, each on item vectors and a backbone of its own (this project's choice).

  Heads of one backbone are in one another's way, and make the same mistakes; towers do neither. The generative one
  knows items by all that the settings name. The dense one knows them without codes, and its attention without
  similarities: it is SASRec, with features where the settings name them. Each head's candidates are scored by both.
  """

  def setup(self) -> None:
    """Makes the towers."""
    generative, dense = tower_settings(self.settings)
    self.generative, self.dense = Recommender(generative), Recommender(dense)
    if self.compares_candidates:
      self.candidate_similarity = CandidateSimilarity(self.settings)

  def loss(
    self,
    catalogue: Catalogue,
    batch: dict[str, jax.Array],
    *,
    deterministic: bool,
    weights: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum of both towers' losses; see `SequenceModel`."""
    total = jnp.zeros((), jnp.float32)
    every: dict[str, jax.Array] = {}
    for tower in (self.generative, self.dense):
      loss, terms = tower.loss(catalogue, batch, deterministic=deterministic, weights=weights)
      total, every = total + loss, every | terms
    return total, every | {"nll": total}

  def last_states(self, catalogue: Catalogue, batch: dict[str, jax.Array]) -> Any:
    """The states of the generative and of the dense tower after the whole history."""
    return self.generative.last_states(catalogue, batch), self.dense.last_states(catalogue, batch)

  def log_probs(self, catalogue: Catalogue, states: Any, items: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """What the loss counts for given items, with the sign turned: both towers' log-probabilities summed, [B, n]."""
    towers = zip((self.generative, self.dense), states, strict=True)
    nothing = jnp.zeros((), jnp.float32)
    return sum((tower.log_probs(catalogue, own, items, seen) for tower, own in towers), start=nothing)

  def scores_of_all(self, catalogue: Catalogue, states: Any, seen: jax.Array | None) -> jax.Array:
    """Log-probabilities by the dense tower, with what is added for similarity; see `SequenceModel`."""
    scores = jax.nn.log_softmax(self.dense.scores(catalogue, states[1], seen), axis=-1)
    if not self.compares_candidates:
      return scores
    return self.compared_scores(catalogue, seen, scores, self.similarity_scores(catalogue, seen))

  def search(
    self,
    catalogue: Catalogue,
    states: Any,
    *,
    width: int,
    exclude: jax.Array | None = None,
    seen: jax.Array | None = None,
    every: jax.Array | None = None,
  ) -> BeamResult:
    """The best of the beam's W / 5 items and of the W best of the full softmax, by the product of both probabilities.

    Where candidates are compared with the history, that counts for the W best of the full softmax, too.
    Log-probabilities are among the candidates.
    """
    of_generative, _ = states
    beam = self.generative.search(catalogue, of_generative, width=-(-width // _NARROWER), exclude=exclude, seen=seen)
    scores = self.scores_of_all(catalogue, states, seen) if every is None else every
    scale = self.candidate_similarity.scale if self.compares_candidates else jnp.ones(2, jnp.float32)
    if exclude is not None:
      scores = without(scores, exclude)
    best, first = jax.lax.top_k(scores, min(width, scores.shape[1]))
    more = unless_in(jnp.where(jnp.isneginf(best), -1, first), beam.items)
    found = jnp.concatenate([beam.items, more], axis=1)
    generated = self.generative.log_probs(catalogue, of_generative, first, seen)
    total = jnp.take_along_axis(scores, jnp.maximum(found, 0), axis=1)
    total = total + scale[0] * jnp.concatenate([beam.log_probs, generated], axis=1)
    return best_candidates(found, total, width=width)

  def base_log_probs(self, catalogue: Catalogue, states: Any, items: jax.Array, seen: jax.Array | None) -> jax.Array:
    """Those of the generative and of the dense tower; see `SequenceModel`."""
    towers = zip((self.generative, self.dense), states, strict=True)
    return jnp.concatenate([tower.base_log_probs(catalogue, own, items, seen) for tower, own in towers], axis=-1)

  def base_candidates(self, catalogue: Catalogue, states: Any, *, width: int, seen: jax.Array | None) -> jax.Array:
    """See `SequenceModel`."""
    towers = zip((self.generative, self.dense), states, strict=True)
    beam, first = (tower.base_candidates(catalogue, own, width=width, seen=seen) for tower, own in towers)
    return jnp.concatenate([beam, unless_in(first, beam)], axis=1)
