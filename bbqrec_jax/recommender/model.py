"""Stage 2, the semantics-aware sequence model: item vectors, backbone with similarity bias, and a head."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bbqrec_jax.ops.candidate_similarity import latest_first
from bbqrec_jax.ops.embedding import summed_embedding
from bbqrec_jax.ops.ranking import each_once
from bbqrec_jax.ops.reduction import mean_weights
from bbqrec_jax.ops.similarity import bucket_bias, continuous_bias, similarity_buckets
from bbqrec_jax.recommender.candidate_similarity import CandidateSimilarity, most_similar, rescored
from bbqrec_jax.recommender.catalogue import Catalogue
from bbqrec_jax.recommender.parts import Items, Memory, at_last, ranked
from bbqrec_jax.recommender.settings import RecommenderSettings, parts_of
from bbqrec_jax.semantic_ids.beam import BeamResult


class SequenceModel(nn.Module):
  """What trains and ranks, whatever is inside.

  Attributes:
    settings: of the recommender.
  """

  settings: RecommenderSettings

  @property
  def exact(self) -> bool:
    """Whether every item has a score; otherwise `search` drops some."""
    return False

  @property
  def reads_history(self) -> bool:
    """Whether a head looks at what the history has, or candidates are compared with it."""
    s = self.settings
    return bool(s.candidate_similarity.streams) or (
      s.seen_item_bias and any(head.reads_history for head in parts_of(s)[1])
    )

  @nn.nowrap  # It is called outside `apply`, too.
  def seen(self, batch: dict[str, jax.Array], *, packed: bool = False) -> jax.Array | None:
    """Deduplicated history items per state, -1-padded, for what looks at them; None where nothing does.

    Args:
      batch: `items` and `segments` [B, T].
      packed: whether every position has a state; otherwise every row has one, after all its items.

    Returns:
      [B, T] int, the latest first, or [B T, T], in any order, of packed histories.
    """
    if not self.reads_history:
      return None
    items, segments = batch["items"], batch["segments"]
    if not packed:
      return latest_first(items, segments > 0)
    place = jnp.arange(items.shape[1], dtype=jnp.int32)
    before = (segments[:, None, :] == segments[:, :, None]) & (place[None, :] <= place[:, None])[None]
    items, segments = items[:, None, :], jnp.where(before, segments[:, None, :], 0)
    return each_once(jnp.where(segments > 0, items, -1)).reshape(-1, segments.shape[-1])

  @nn.nowrap
  def target_mask(self, batch: dict[str, jax.Array]) -> jax.Array:
    """Where a batch has a next item to learn from: bool, [B, T] packed positions, or [B] rows of one history each."""
    real = batch["segments"] > 0
    return real if self.settings.packed else real[:, 0]

  def loss(
    self,
    catalogue: Catalogue,
    batch: dict[str, jax.Array],
    *,
    deterministic: bool,
    weights: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of the next item wherever there is one.

    Args:
      catalogue: the items.
      batch: `items`, `segments`, `positions`, each [B, T] int, and `targets`. Where histories are packed, nearly every
        position is real, and `targets` [B, T] has the next item of each, and where the model has time buckets there are
        `times` [B, T] in seconds; where a row is a history, `targets` [B] has what follows it. Padding (segment 0) is
        masked out.
      deterministic: no dropout.
      weights: what each of `target_mask` weighs, float32 of its shape, where the batch is a part of a larger one; None:
        all alike, so that the loss is their mean.

    Returns:
      (loss, terms): the weighted sum over real positions; `terms` has the loss as `nll`, and each part of it that the
      head tells apart.
    """
    raise NotImplementedError

  def last_states(self, catalogue: Catalogue, batch: dict[str, jax.Array]) -> Any:
    """The state after the whole history, one history a row: `items`, `segments`, `positions` [B, T] -> [B, d].

    A `Memory` where the head reads one, and a tuple of two towers' states.
    """
    raise NotImplementedError

  def log_probs(self, catalogue: Catalogue, states: Any, items: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """What the loss counts for given items, with the sign turned: states [B, d], items [B, n] -> [B, n] float32.

    The log-probability of an item's semantic ID (generative, parallel), or of the item among all (dense), or both
    towers' summed. `seen` is that of the method of this name.
    """
    raise NotImplementedError

  def base_log_probs(self, catalogue: Catalogue, states: Any, items: jax.Array, seen: jax.Array | None) -> jax.Array:
    """Of given items [B, n] the log-probability by each model whose scores are summed, [B, n, bases] float32.

    Before anything is added for candidates' similarity, and so are `base_candidates`.
    """
    raise NotImplementedError

  def base_candidates(self, catalogue: Catalogue, states: Any, *, width: int, seen: jax.Array | None) -> jax.Array:
    """The items that each of these models puts first, [B, n] int, each once; -1 fills."""
    raise NotImplementedError

  def scores_of_all(self, catalogue: Catalogue, states: Any, seen: jax.Array | None) -> jax.Array | None:
    """Numbers of all items that a search reads, whatever it leaves out, [B, N] float32; None where it reads none."""
    raise NotImplementedError

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
    """The best items.

    Args:
      catalogue: the items.
      states: of B histories, as `last_states` gives them.
      width: W, of the beam, and how many items come back.
      exclude: [B, E] int, items that must not; -1 fills.
      seen: see `log_probs`.
      every: what `scores_of_all` gives for these states, for several searches; None: it is computed here.

    Returns:
      A `BeamResult` of W columns.
    """
    raise NotImplementedError

  def __call__(self, catalogue: Catalogue, batch: dict[str, Any]) -> jax.Array:
    """The loss, without dropout; touches every parameter, for `init`."""
    if self.compares_candidates:
      self.candidate_similarity.touch()
    return self.loss(catalogue, batch, deterministic=True)[0]

  @property
  def compares_candidates(self) -> bool:
    """Whether candidates are compared with the last items of the history."""
    return bool(self.settings.candidate_similarity.streams)

  def similarity_scores(self, catalogue: Catalogue, seen: jax.Array | None) -> jax.Array:
    """What is added to the score of every item for its similarity to the history, [B, N] float32."""
    assert catalogue.candidates is not None
    assert seen is not None
    return self.candidate_similarity(catalogue.candidates, seen)

  def compared_scores(
    self,
    catalogue: Catalogue,
    seen: jax.Array | None,
    base: jax.Array,
    added: jax.Array,
    items: jax.Array | None = None,
  ) -> jax.Array:
    """Scores of items, or of all, from a base's and from what is added; see `CandidateSimilarity.scores`."""
    assert catalogue.candidates is not None
    assert seen is not None
    return self.candidate_similarity.scores(catalogue.candidates, seen, base, added, items)


class Recommender(SequenceModel):
  """Item vectors -> backbone with similarity bias -> head."""

  def setup(self):
    """Makes the parameters and submodules."""
    s = self.settings
    if s.item_embedding:
      self.item_embedding = self.param(
        "item_embedding", nn.initializers.normal(0.02), (s.num_items, s.width), jnp.float32
      )
    if s.num_columns:
      self.code_embedding = self.param(
        "code_embedding", nn.initializers.normal(0.02), (s.num_columns * s.num_codes, s.width), jnp.float32
      )
    if s.feature_width:
      self.feature_map = self.param(
        "feature_map", nn.initializers.normal(0.02), (s.feature_width, s.width), jnp.float32
      )
    if s.num_streams:
      # Zero tables: at step 0 the model is the plain backbone, bit for bit.
      self.similarity_tables = self.param("similarity_tables", nn.initializers.zeros, s.table_shape, jnp.float32)
    self.backbone = s.backbone_class(s)
    self.head = s.head_class(s)
    if self.compares_candidates:
      self.candidate_similarity = CandidateSimilarity(s)

  @property
  def exact(self) -> bool:
    """See `parts.Head`."""
    return self.settings.head_class.exact

  def item_vectors(
    self,
    catalogue: Catalogue,
    items: jax.Array | None = None,
    *,
    first_column: int = 0,
    known: jax.Array | None = None,
  ) -> jax.Array:
    """What an item is known by: items [...] -> [..., d]; None means all N in order.

    It is the sum of its codes' embeddings, a linear map of its features, and a vector of its own. An item of the
    catalogue that was not there in training has no vector of its own: zero stands for it.

    Columns of codes before `first_column` are left out, and the vectors of their own of items that are not `known`, [N]
    bool.
    """
    s = self.settings
    total: jax.Array = jnp.zeros((), jnp.float32)
    if s.item_embedding:
      own = jnp.pad(self.item_embedding, ((0, catalogue.num_items - s.num_items), (0, 0)))
      if known is not None:
        own = jnp.where(known[:, None], own, 0)
      total = own if items is None else own[items]
    if s.feature_width:
      assert catalogue.features is not None
      features = catalogue.features if items is None else catalogue.features[items]
      total = total + features.astype(self.feature_map.dtype) @ self.feature_map
    if s.num_columns > first_column:
      columns = catalogue.columns if items is None else catalogue.columns[items]
      tables = self.code_embedding.reshape(s.num_columns, s.num_codes, s.width)[first_column:]
      first_row = (s.num_codes * jnp.arange(s.num_columns, dtype=jnp.int32)).reshape((1,) * (columns.ndim - 1) + (-1,))
      total = total + summed_embedding(tables, (columns - first_row)[..., first_column:])
    return jnp.asarray(total)

  def _tokens(self, catalogue: Catalogue, items: jax.Array, *, known: jax.Array | None) -> jax.Array:
    """The tokens that an item is to a backbone that reads codes: items [B, T] -> [B, T, L, d].

    They are its ID's codes; what else it is known by, other codes or a vector of its own, is added to each.
    """
    s = self.settings
    tokens = self.code_embedding[catalogue.columns[items][..., : s.num_levels]]
    if s.item_embedding or s.feature_width or s.num_columns > s.num_levels:
      tokens = tokens + self.item_vectors(catalogue, items, first_column=s.num_levels, known=known)[..., None, :]
    return tokens

  def _known(self, catalogue: Catalogue, *, deterministic: bool) -> jax.Array | None:
    """Which items have their own vectors in this step, [N] bool; None: all."""
    s = self.settings
    if deterministic or not (s.item_dropout and s.item_embedding):
      return None
    return jax.random.bernoulli(self.make_rng("dropout"), jnp.float32(1.0 - s.item_dropout), (catalogue.num_items,))

  def bias(self, catalogue: Catalogue, items: jax.Array, segments: jax.Array) -> jax.Array | None:
    """The attention bias [B, H, T, T] of histories `items` [B, T]; None where similarity is switched off."""
    s = self.settings
    if not s.num_streams:
      return None
    streams, real = catalogue.streams[items], segments > 0
    tables = self.similarity_tables.astype(jnp.float32)
    if not s.table_buckets:
      return continuous_bias(tables, streams, real, pairs=s.pairs)
    return bucket_bias(tables, similarity_buckets(streams, real, catalogue.edges, pairs=s.pairs))

  def states(
    self,
    catalogue: Catalogue,
    batch: dict[str, jax.Array],
    *,
    deterministic: bool = True,
    known: jax.Array | None = None,
  ) -> Any:
    """What the backbone makes of histories: states at all positions [B, T, d] or the last [B, d], or a `Memory`.

    Args:
      catalogue: the items.
      batch: `items`, `segments`, `positions` and, if any, `times`, each [B, T] int.
      deterministic: no dropout.
      known: see `item_vectors`.
    """
    return self.backbone(*self._histories(catalogue, batch, known), deterministic=deterministic)

  def _histories(self, catalogue: Catalogue, batch: dict[str, jax.Array], known: jax.Array | None) -> tuple[Any, ...]:
    """Histories as the backbone reads them."""
    items, segments = batch["items"], batch["segments"]
    read = self._tokens if self.settings.backbone_class.reads_codes else self.item_vectors
    x = read(catalogue, items, known=known)
    return x, segments, batch["positions"], self.bias(catalogue, items, segments), batch.get("times")

  def _for_head(self, states: Any) -> Any:
    """What the head reads of states, one a history: of a memory perhaps its mean."""
    of_mean = isinstance(states, Memory) and not self.settings.head_class.reads_memory
    return states.pooled() if of_mean else states

  def _items(self, catalogue: Catalogue, seen: jax.Array | None = None, *, known: jax.Array | None = None) -> Items:
    """The items as heads see them."""
    if self.reads_history and seen is None:
      raise ValueError("this model scores by what the history has: give it `seen`, as the method of this name makes it")
    return Items(catalogue, lambda items=None: self.item_vectors(catalogue, items, known=known), seen)

  def loss(
    self,
    catalogue: Catalogue,
    batch: dict[str, jax.Array],
    *,
    deterministic: bool,
    weights: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """See `SequenceModel`."""
    packed = self.settings.packed
    if weights is None:
      weights = mean_weights(self.target_mask(batch))
    known = self._known(catalogue, deterministic=deterministic)
    states = self.states(catalogue, batch, deterministic=deterministic, known=known)
    if packed:
      states = states.reshape(-1, states.shape[-1])
    elif not isinstance(states, Memory):
      states = at_last(states, batch["segments"])
    of_items = self._items(catalogue, self.seen(batch, packed=packed), known=known)
    terms = self.head.summed_losses(
      of_items, self._for_head(states), batch["targets"].reshape(-1), weights.reshape(-1), deterministic=deterministic
    )
    loss = sum(terms.values(), start=jnp.zeros((), jnp.float32))
    return loss, terms | {"nll": loss}

  def last_states(self, catalogue: Catalogue, batch: dict[str, jax.Array]) -> Any:
    """See `SequenceModel`."""
    return self._for_head(self.backbone.last_states(*self._histories(catalogue, batch, None)))

  def scores(self, catalogue: Catalogue, states: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """Score of every item, of an exact head: states [B, d] -> [B, N] float32; its softmax is over the catalogue."""
    base = self.head.scores(self._items(catalogue, seen), states)
    if not self.compares_candidates:
      return base
    return self.compared_scores(catalogue, seen, base, self.similarity_scores(catalogue, seen))

  def log_probs(self, catalogue: Catalogue, states: Any, items: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """See `SequenceModel`."""
    return self.head.log_probs(self._items(catalogue, seen), states, items)

  def base_log_probs(self, catalogue: Catalogue, states: Any, items: jax.Array, seen: jax.Array | None) -> jax.Array:
    """See `SequenceModel`."""
    if not self.exact:
      return self.log_probs(catalogue, states, items, seen)[..., None]
    every = jax.nn.log_softmax(self.head.scores(self._items(catalogue, seen), states), axis=-1)
    return jnp.take_along_axis(every, items, axis=1)[..., None]

  def base_candidates(self, catalogue: Catalogue, states: Any, *, width: int, seen: jax.Array | None) -> jax.Array:
    """See `SequenceModel`."""
    return self.head.search(self._items(catalogue, seen), states, width=width).items

  def scores_of_all(self, catalogue: Catalogue, states: Any, seen: jax.Array | None) -> jax.Array | None:
    """An exact head's scores; of others what is added for similarity; see `SequenceModel`."""
    if not self.compares_candidates:
      return None
    return self.scores(catalogue, states, seen) if self.exact else self.similarity_scores(catalogue, seen)

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
    """See `SequenceModel`.

    Where candidates are compared with the history, those of a beam are joined by the most similar of all.
    """
    items = self._items(catalogue, seen)
    if not self.compares_candidates:
      return self.head.search(items, states, width=width, exclude=exclude)
    if every is None:
      every = self.scores_of_all(catalogue, states, seen)
    assert every is not None
    if self.exact:
      return ranked(every, width=width, exclude=exclude)
    beam = self.head.search(items, states, width=width, exclude=exclude)
    near = most_similar(every, beam.items, width=width, exclude=exclude)
    found = jnp.concatenate([beam.items, near], axis=1)
    of_near = self.head.log_probs(items, states, jnp.maximum(near, 0))
    base = jnp.concatenate([beam.log_probs, of_near], axis=1)
    some = jnp.maximum(found, 0)
    added = jnp.take_along_axis(every, some, axis=1)
    scores = self.compared_scores(catalogue, seen, base, added, some)
    return rescored(found, base, scores, width=width)
