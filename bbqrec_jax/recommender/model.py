"""Stage 2, the semantics-aware sequence model: item vectors, backbone with similarity bias, and a head."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bbqrec_jax.errors import InputError
from bbqrec_jax.layers.transformer import CausalBackbone
from bbqrec_jax.ops.embedding import summed_embedding
from bbqrec_jax.ops.ranking import each_once, without
from bbqrec_jax.ops.reduction import mean_weights
from bbqrec_jax.ops.similarity import bucket_bias, continuous_bias, similarity_buckets
from bbqrec_jax.recommender.catalogue import Catalogue, RecommenderSettings
from bbqrec_jax.recommender.encoder_decoder import Encoder, Memory, encoder_shape
from bbqrec_jax.recommender.heads import Items, make_head, summed_losses
from bbqrec_jax.recommender.settings import BACKBONES
from bbqrec_jax.semantic_ids.beam import BeamResult, filled_beam
from bbqrec_jax.utils.named import named


def causal(s: RecommenderSettings) -> CausalBackbone:
  """The causal backbone of the settings."""
  return CausalBackbone(
    s.num_layers,
    s.num_heads,
    s.mlp_width,
    s.max_length,
    s.dropout,
    s.attention,
    s.position_buckets if s.positions == "relative" else 0,
    s.time_buckets,
  )


def encoder_decoder(s: RecommenderSettings) -> Encoder:
  """The encoder of the settings, for the encoder-decoder."""
  return Encoder(encoder_shape(s), s.num_layers, s.position_buckets)


def make_backbone(settings: RecommenderSettings) -> Any:
  """The backbone that the settings name: one of `BACKBONES`, or what "module:function" makes of them.

  Raises:
    ValueError: if there is no such module or function.
  """
  return named(settings.backbone, BACKBONES)(settings)


def check_parts(settings: RecommenderSettings) -> None:
  """Makes the head and the backbone that the settings name, which may be somebody's own, and looks at them.

  Raises:
    InputError: if one cannot be made, or what is made is none.
  """
  for part, name, make in (("head", settings.head, make_head), ("backbone", settings.backbone, make_backbone)):
    try:
      made = make(settings)
      search = "scores" if part == "head" and getattr(made, "exact", False) else "search"
      needed = ("losses", "exact", search) if part == "head" else ("__call__",)
      lacking = [attribute for attribute in needed if not hasattr(made, attribute)]
      came = f"a {type(made).__name__} without {', '.join(lacking)}" if lacking else ""
    except Exception as error:  # It may be anybody's code.
      came = f"{type(error).__name__}: {error}"
    if came:
      raise InputError(
        f"config field recommender.{part} = {name!r}: expected a function that makes a {part} of the settings (see"
        f" bbqrec_jax/models/{part}s.py), got {came}"
      )


class Recommender(nn.Module):
  """Item vectors -> causal backbone with similarity bias -> head.

  Attributes:
    settings: the shapes.
  """

  settings: RecommenderSettings

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
    self.backbone = make_backbone(s)
    self.head = make_head(s)

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

  def _known(self, catalogue: Catalogue, *, deterministic: bool) -> jax.Array | None:
    """Which items have their own vectors in this step, [N] bool; None: all."""
    s = self.settings
    if deterministic or not (s.item_dropout and s.item_embedding):
      return None
    return jax.random.bernoulli(self.make_rng("dropout"), jnp.float32(1.0 - s.item_dropout), (catalogue.num_items,))

  def memory(
    self,
    catalogue: Catalogue,
    items: jax.Array,
    segments: jax.Array,
    *,
    deterministic: bool = True,
    known: jax.Array | None = None,
  ) -> Memory:
    """What the encoder makes of histories, one a row: items, segments [B, T] -> a `Memory` of B rows.

    An item's tokens are its ID's codes; what else it is known by, other codes or a vector of its own, is added to each.
    """
    s = self.settings
    tokens = self.code_embedding[catalogue.columns[items][..., : s.num_levels]]
    if s.item_embedding or s.feature_width or s.num_columns > s.num_levels:
      tokens = tokens + self.item_vectors(catalogue, items, first_column=s.num_levels, known=known)[..., None, :]
    bias = self.bias(catalogue, items, segments)
    return self.backbone(tokens, segments > 0, bias, deterministic=deterministic)

  def bias(self, catalogue: Catalogue, items: jax.Array, segments: jax.Array) -> jax.Array | None:
    """The attention bias [B, H, T, T] of histories `items` [B, T]; None where similarity is switched off."""
    s = self.settings
    if not s.num_streams:
      return None
    streams, real = catalogue.streams[items], segments > 0
    tables = self.similarity_tables.astype(jnp.float32)
    if not s.num_buckets:
      return continuous_bias(tables, streams, real, pairs=s.pairs)
    return bucket_bias(tables, similarity_buckets(streams, real, catalogue.edges, pairs=s.pairs))

  def states(
    self,
    catalogue: Catalogue,
    items: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    times: jax.Array | None = None,
    *,
    deterministic: bool = True,
    known: jax.Array | None = None,
  ) -> jax.Array:
    """The state at each position of each history: items, segments, positions (and times) [B, T] int -> [B, T, d].

    `known` is that of `item_vectors`, here and in `memory`.
    """
    x = self.item_vectors(catalogue, items, known=known)
    bias = self.bias(catalogue, items, segments)
    more = {} if times is None else {"times": times}
    return self.backbone(x, segments, positions, bias, deterministic=deterministic, **more)

  @nn.nowrap  # It is called outside `apply`, too, where a module's own methods cannot make heads.
  def seen(self, batch: dict[str, jax.Array], *, packed: bool = False) -> jax.Array | None:
    """The items of the history behind each state, each once, for heads that look at them; None where none does.

    Args:
      batch: `items` and `segments` [B, T].
      packed: whether every position has a state; otherwise every row has one, after all its items.

    Returns:
      [B, T] int, or [B T, T] of packed histories; -1 fills.
    """
    if not self.reads_history:
      return None
    items, segments = batch["items"], batch["segments"]
    if packed:
      place = jnp.arange(items.shape[1], dtype=jnp.int32)
      before = (segments[:, None, :] == segments[:, :, None]) & (place[None, :] <= place[:, None])[None]
      items, segments = items[:, None, :], jnp.where(before, segments[:, None, :], 0)
    return each_once(jnp.where(segments > 0, items, -1)).reshape(-1, segments.shape[-1])

  def _items(self, catalogue: Catalogue, seen: jax.Array | None = None, *, known: jax.Array | None = None) -> Items:
    """The items as heads see them."""
    if self.reads_history and seen is None:
      raise ValueError("this model scores by what the history has: give it `seen`, as the method of this name makes it")
    return Items(catalogue, lambda items=None: self.item_vectors(catalogue, items, known=known), seen)

  def target_mask(self, batch: dict[str, jax.Array]) -> jax.Array:
    """Where a batch has a next item to learn from: bool, [B, T] positions or, of the encoder-decoder, [B] rows."""
    real = batch["segments"] > 0
    return real[:, 0] if self.settings.backbone == "encoder_decoder" else real

  def loss(
    self,
    catalogue: Catalogue,
    batch: dict[str, jax.Array],
    *,
    deterministic: bool,
    weights: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of the next item at every position that has one.

    Args:
      catalogue: the items.
      batch: `items`, `segments`, `positions`, each [B, T] int, and `targets`. For a causal backbone histories are
        packed, so nearly every position is real, and `targets` [B, T] has the next item of each, and where the model
        has time buckets there are `times` [B, T] in seconds; for the
        encoder-decoder a row is a history, and `targets` [B] what follows it. Padding (segment 0) is masked out.
      deterministic: no dropout.
      weights: what each of `target_mask` weighs, float32 of its shape, where the batch is a part of a larger one; None:
        all alike, so that the loss is their mean.

    Returns:
      (loss, terms): the weighted sum over real positions; `terms` has the loss as `nll`, and each part of it that the
      head tells apart.
    """
    items, segments, targets = batch["items"], batch["segments"], batch["targets"].reshape(-1)
    if weights is None:
      weights = mean_weights(self.target_mask(batch))
    known = self._known(catalogue, deterministic=deterministic)
    if self.settings.backbone == "encoder_decoder":
      states = self._from_memory(self.memory(catalogue, items, segments, deterministic=deterministic, known=known))
    else:
      states = self.states(
        catalogue, items, segments, batch["positions"], batch.get("times"), deterministic=deterministic, known=known
      )
      states = states.reshape(-1, states.shape[-1])
    weights = weights.reshape(-1)
    seen = self.seen(batch, packed=self.settings.backbone != "encoder_decoder")
    of_items = self._items(catalogue, seen, known=known)
    terms = summed_losses(self.head, of_items, states, targets, weights, deterministic=deterministic)
    loss = sum(terms.values(), start=jnp.zeros((), jnp.float32))
    return loss, terms | {"nll": loss}

  def _from_memory(self, memory: Memory) -> Any:
    """What the head reads: the memory itself, or one vector of each history."""
    return memory if getattr(self.head, "reads_memory", False) else memory.pooled()

  def last_states(self, catalogue: Catalogue, batch: dict[str, jax.Array]) -> Any:
    """The state after the whole history, one history a row: `items`, `segments`, `positions` [B, T] -> [B, d].

    Of the encoder-decoder with the generative head, a `Memory`.
    """
    if self.settings.backbone == "encoder_decoder":
      return self._from_memory(self.memory(catalogue, batch["items"], batch["segments"]))
    states = self.states(catalogue, batch["items"], batch["segments"], batch["positions"], batch.get("times"))
    last = jnp.maximum(jnp.sum(batch["segments"] > 0, axis=1, dtype=jnp.int32) - 1, 0)
    return jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]

  @property
  def reads_history(self) -> bool:
    """Whether the head looks at what the history has."""
    head = make_head(self.settings) if self.scope is None else self.head
    return self.settings.seen_item_bias and getattr(head, "reads_history", False)

  @property
  def exact(self) -> bool:
    """Whether the head scores every item; otherwise it searches, and what its beam drops has no score."""
    return make_head(self.settings).exact

  def scores(self, catalogue: Catalogue, states: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """Score of every item, of an exact head: states [B, d] -> [B, N] float32; its softmax is over the catalogue.

    `seen` is that of the method of this name, here and below.
    """
    return self.head.scores(self._items(catalogue, seen), states)

  def log_probs(self, catalogue: Catalogue, states: Any, items: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """What the loss counts for given items, with the sign turned: states [B, d], items [B, n] -> [B, n] float32.

    The log-probability of an item's semantic ID (generative, parallel), or of the item among all (dense).
    """
    if hasattr(self.head, "log_probs"):
      return self.head.log_probs(self._items(catalogue, seen), states, items)
    batch, count = items.shape
    repeated, seen = jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), (states, seen))
    parts = self.head.losses(self._items(catalogue, seen), repeated, items.reshape(-1), deterministic=True)
    return -sum(parts.values(), start=jnp.zeros((), jnp.float32)).reshape(batch, count)

  def search(
    self,
    catalogue: Catalogue,
    states: Any,
    *,
    width: int,
    exclude: jax.Array | None = None,
    seen: jax.Array | None = None,
  ) -> BeamResult:
    """The best items.

    Args:
      catalogue: the items.
      states: of B histories, as `last_states` gives them.
      width: W, of the beam, and how many items come back.
      exclude: [B, E] int, items that must not; -1 fills.
      seen: see `scores`.

    Returns:
      A `BeamResult` of W columns.
    """
    items = self._items(catalogue, seen)
    if not self.head.exact:
      return self.head.search(items, states, width=width, exclude=exclude)
    scores = jax.nn.log_softmax(self.head.scores(items, states), axis=-1)
    if exclude is not None:
      scores = without(scores, exclude)
    best, chosen = jax.lax.top_k(scores, min(width, scores.shape[1]))
    return filled_beam(jnp.where(jnp.isneginf(best), -1, chosen), best, width=width)

  def __call__(self, catalogue: Catalogue, batch: dict[str, Any]) -> jax.Array:
    """The loss, without dropout; touches every parameter, for `init`."""
    return self.loss(catalogue, batch, deterministic=True)[0]
