"""What a recommender is made of: a backbone turns histories into states, a head ranks items by these.

Both are flax modules that are made of the recommender's settings, and declare as class attributes what they need.
A config names one of this project's, or a custom class as "module:Class".
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from bbqrec_jax.errors import InputError
from bbqrec_jax.ops.positions import last_places
from bbqrec_jax.ops.ranking import without
from bbqrec_jax.recommender.catalogue import Catalogue
from bbqrec_jax.recommender.settings import BACKBONES, HEADS, RecommenderSettings
from bbqrec_jax.semantic_ids.beam import BeamResult, filled_beam
from bbqrec_jax.semantic_ids.trie import build_trie


@flax.struct.dataclass
class Memory:
  """What an encoder makes of histories, for a decoder to attend to.

  Attributes:
    tokens: [B, S, d].
    real: [B, S] bool, False at padding.
  """

  tokens: jax.Array
  real: jax.Array

  def pooled(self) -> jax.Array:
    """Mean of the real tokens, [B, d]."""
    weight = self.real[..., None].astype(self.tokens.dtype)
    return jnp.sum(self.tokens * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1.0)


class Items(NamedTuple):
  """What a head is told of the items.

  Attributes:
    catalogue: their semantic IDs, and the trie of those.
    vectors: items [...] int -> their vectors [..., d]; None gives all, [N, d].
    seen: [P, T] (or [B, T]) int, deduplicated history items per state, -1-padded; None where the settings, or the head,
      do without.
  """

  catalogue: Catalogue
  vectors: Callable[..., jax.Array]
  seen: jax.Array | None = None


def weighted(parts: dict[str, jax.Array], weights: jax.Array) -> dict[str, jax.Array]:
  """Sums each part [P] as the positions weigh; what weighs nothing may be anything."""
  return {
    name: jnp.sum(jnp.where(weights > 0, part.astype(jnp.float32) * weights, 0.0)) for name, part in parts.items()
  }


class Backbone(nn.Module):
  """Histories in, states out.

  Attributes:
    settings: of the recommender.
    rows: "packed", several histories in a row, each position attending to its own segment and before it alone, and
      predicting the item after it; or "history", one history a row, of which the whole predicts the next item.
    reads_codes: whether an item is the tokens of its ID's codes, [B, T, L, d], in place of one vector, [B, T, d].
    makes_memory: whether it gives a `Memory` in place of states [B, T, d]; its rows are then one history each.
  """

  settings: RecommenderSettings
  rows: ClassVar[str] = "packed"
  reads_codes: ClassVar[bool] = False
  makes_memory: ClassVar[bool] = False

  @classmethod
  def check(cls, settings: RecommenderSettings, prefix: str) -> None:
    """Refuses settings that it does not work with; `prefix` is that of their names in the config.

    Raises:
      InputError: if there are some.
    """

  def __call__(
    self,
    x: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    bias: jax.Array | None = None,
    times: jax.Array | None = None,
    *,
    deterministic: bool = True,
  ) -> Any:
    """Item vectors or tokens -> states [B, T, d], or a `Memory`.

    Where each row is one history, the states at their last items are enough, [B, d].

    Args:
      x: [B, T, d], or [B, T, L, d] where it reads codes.
      segments: [B, T] int; 0 is padding, equal positive numbers in a row are one history.
      positions: [B, T] int, the place of each item in its history, from 0.
      bias: [B, H, T, T] to add to attention scores, or None.
      times: [B, T] int, the second of each interaction, or None.
      deterministic: no dropout.
    """
    raise NotImplementedError

  def last_states(self, x: jax.Array, segments: jax.Array, *more: Any) -> Any:
    """The states [B, d] at the last items, or a `Memory`, of rows of one history each; see `__call__`.

    For a backbone that knows a faster way to them than through all states.
    """
    states = self(x, segments, *more, deterministic=True)
    return states if isinstance(states, Memory) else at_last(states, segments)


def at_last(states: jax.Array, segments: jax.Array) -> jax.Array:
  """States [B, T, d] of rows of one history each -> [B, d], those at the last items; [B, d] are these already."""
  if states.ndim == 2:
    return states
  return jnp.take_along_axis(states, last_places(segments)[:, None, None], axis=1)[:, 0]


class Head(nn.Module):
  """States in, a ranking of items out. A head defines `losses`, and `scores` if it is `exact`, else `search`.

  Attributes:
    settings: of the recommender.
    exact: whether it scores every item; otherwise it searches, and what its search drops has no score.
    reads_history: whether it is told of the items that the history has, as `Items.seen`.
    reads_codes: whether it needs the items' semantic IDs and their trie.
    reads_memory: whether its states are a `Memory`; otherwise they are [P, d].
    memory_head: the head that takes its place over a backbone that makes a memory; None: itself, reading the mean.
  """

  settings: RecommenderSettings
  exact: ClassVar[bool] = True
  reads_history: ClassVar[bool] = False
  reads_codes: ClassVar[bool] = False
  reads_memory: ClassVar[bool] = False
  memory_head: ClassVar[Any] = None

  @classmethod
  def check(cls, settings: RecommenderSettings, prefix: str) -> None:
    """As `Backbone.check`."""

  def losses(self, items: Items, states: Any, targets: jax.Array, *, deterministic: bool) -> dict[str, jax.Array]:
    """The parts of the loss by name, each [P] float32; targets [P] int. The loss is their sum."""
    raise NotImplementedError

  def scores(self, items: Items, states: Any) -> jax.Array:
    """Scores of all items, [B, N] float32; their softmax is over the catalogue."""
    raise NotImplementedError

  def summed_losses(
    self, items: Items, states: Any, targets: jax.Array, weights: jax.Array, *, deterministic: bool
  ) -> dict[str, jax.Array]:
    """The parts of the loss, each a float32 scalar: the sum over positions as they weigh, [P] float32.

    For a head that knows a faster way to them than through each.
    """
    return weighted(self.losses(items, states, targets, deterministic=deterministic), weights)

  def log_probs(self, items: Items, states: Any, some: jax.Array) -> jax.Array:
    """Minus the loss of each of `some` items, [B, n] int -> [B, n] float32.

    For a head that knows a faster way to them than through each.
    """
    batch, count = some.shape
    repeated, seen = jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), (states, items.seen))
    parts = self.losses(items._replace(seen=seen), repeated, some.reshape(-1), deterministic=True)
    return -sum(parts.values(), start=jnp.zeros((), jnp.float32)).reshape(batch, count)

  def search(self, items: Items, states: Any, *, width: int, exclude: jax.Array | None = None) -> BeamResult:
    """The best `width` items and their log-probabilities, without those of `exclude`, [B, E] int; -1 fills."""
    return ranked(self.scores(items, states), width=width, exclude=exclude)


def ranked(scores: jax.Array, *, width: int, exclude: jax.Array | None = None) -> BeamResult:
  """The best `width` items by scores [B, N], and their log-probabilities, without those of `exclude`; -1 fills."""
  scores = jax.nn.log_softmax(scores, axis=-1)
  if exclude is not None:
    scores = without(scores, exclude)
  best, chosen = jax.lax.top_k(scores, min(width, scores.shape[1]))
  return filled_beam(jnp.where(jnp.isneginf(best), -1, chosen), best, width=width)


@functools.cache
def check_parts(settings: RecommenderSettings) -> None:
  """Makes the backbone and the head that the settings name, and tries out custom ones.

  Raises:
    InputError: if one is none or cannot be made, they do not fit each other, one gives another shape than it says, or
      the backbone mixes the users of a row.
  """
  chosen = {"backbone": settings.backbone_class, "head": settings.head_class}
  for kind, part in chosen.items():
    name = getattr(settings, kind)
    try:
      made = part(settings)
      if kind == "backbone" and name not in BACKBONES:
        _try_backbone(made)
      if kind == "head" and name not in HEADS:
        _try_head(part, settings)
    except InputError as error:
      raise InputError(f"config field recommender.{kind} = {name!r}: {error}") from error
    except Exception as error:  # It may be anybody's code.
      raise InputError(f"config field recommender.{kind} = {name!r}: {type(error).__name__}: {error}") from error
  if chosen["head"].reads_memory and not chosen["backbone"].makes_memory:
    raise InputError(
      f"config field recommender.head = {settings.head!r} reads a memory, which recommender.backbone ="
      f" {settings.backbone!r} does not make: choose another of them"
    )


def _try_backbone(backbone: Any) -> None:
  """Runs a backbone with random parameters, where rows are packed on two users in one and on the second alone.

  Raises:
    InputError: if its output is not of the shape that it should be, or the second user's states are not the same.
  """
  s, rng = backbone.settings, np.random.default_rng(0)
  if backbone.makes_memory and s.packed:
    raise InputError("a memory is of one history: declare rows = 'history'")
  shape = (2, 4, s.num_levels, s.width) if backbone.reads_codes else (2, 4, s.width)
  x = rng.normal(size=shape).astype(np.float32)
  x[1, :2] = x[0, 2:]
  segments = jnp.asarray([[1, 1, 2, 2] if s.packed else [1, 1, 1, 1], [1, 1, 0, 0]], jnp.int32)
  positions = jnp.asarray([[0, 1, 0, 1], [0, 1, 0, 0]], jnp.int32)
  bias = jnp.zeros((2, s.num_heads, 4, 4), jnp.float32) if s.num_streams else None
  inputs = (jnp.asarray(x), segments, positions, bias, positions if s.time_buckets else None)
  shapes = jax.eval_shape(backbone.init, jax.random.key(0), *inputs).get("params", {})
  params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)
  states = jax.jit(backbone.apply)({"params": params}, *inputs)
  if backbone.makes_memory:
    if not (isinstance(states, Memory) and states.tokens.shape == (*states.real.shape, s.width)):
      raise InputError(f"expected a Memory of [B, S, {s.width}] tokens and [B, S] which are real")
  elif getattr(states, "shape", None) not in [(2, 4, s.width)] + [(2, s.width)] * (not s.packed):
    shapes = f"[B, T, {s.width}]" + f" or [B, {s.width}]" * (not s.packed)
    raise InputError(f"expected states {shapes}, got {getattr(states, 'shape', type(states).__name__)}")
  elif s.packed and not np.allclose(states[0, 2:], states[1, :2], rtol=1e-3, atol=1e-4):
    raise InputError(
      "a user's states depend on the other user of the row: let a position see its own segment alone, counted from its"
      " own start, or declare rows = 'history'"
    )


_TRIED_ITEMS = 64


def _try_head(head_class: Any, settings: RecommenderSettings) -> None:
  """Traces a head's methods, on states of three histories and a catalogue of few items with codes of their own.

  Raises:
    InputError: if what they give is not of the shape that it should be.
  """
  levels, codes = settings.num_levels, settings.num_codes
  count = min(_TRIED_ITEMS, codes**levels) if levels else _TRIED_ITEMS
  s = dataclasses.replace(settings, num_items=count)
  ids = (np.arange(count)[:, None] // codes ** np.arange(levels)[::-1] % max(codes, 1)).astype(np.int32)
  none, vectors = np.zeros((count, 0), np.int32), jnp.zeros((count, s.width), jnp.float32)
  catalogue = Catalogue(
    jnp.asarray(ids), jnp.asarray(none), jnp.zeros((count, 0, 1)), jnp.zeros((0, 0)),
    trie=build_trie(ids) if levels else None,
  )  # fmt: skip
  items = Items(catalogue, lambda some=None: vectors if some is None else vectors[some], jnp.zeros((3, 4), jnp.int32))
  states: Any = jnp.zeros((3, s.width), jnp.float32)
  if head_class.reads_memory:
    states = Memory(jnp.zeros((3, 4, s.width), jnp.float32), jnp.ones((3, 4), bool))
  head, targets = head_class(s), jnp.zeros(3, jnp.int32)

  def every(key: jax.Array) -> dict[str, Any]:
    """What it gives for the loss, and for a ranking."""

    def losses(head: Head) -> dict[str, jax.Array]:
      return head.losses(items, states, targets, deterministic=True)

    terms, made = head.init_with_output(key, method=losses)
    ranking = "scores" if head_class.exact else "search"
    options = {} if head_class.exact else {"width": 2}
    return {"losses": terms, ranking: head.apply(made, items, states, method=ranking, **options)}

  try:
    given = jax.eval_shape(every, jax.random.key(0))
  except NotImplementedError:
    raise InputError("expected losses, and scores, or search where exact is False: one is missing") from None
  terms = given["losses"]
  if not isinstance(terms, dict) or not terms or any(getattr(term, "shape", None) != (3,) for term in terms.values()):
    raise InputError(f"losses: expected a dict of float arrays of the targets' shape [P], got {_shapes(terms)}")
  if head_class.exact and getattr(given["scores"], "shape", None) != (3, count):
    raise InputError(f"scores: expected an array [B, N], a score of every item, got {_shapes(given['scores'])}")
  if not head_class.exact and not (
    isinstance(given["search"], BeamResult) and given["search"].items.shape == given["search"].log_probs.shape == (3, 2)
  ):
    raise InputError(f"search: expected a BeamResult of [B, width] items, got {_shapes(given['search'])}")


def _shapes(value: Any) -> str:
  """The shapes of arrays, for a message."""
  return str(jax.tree.map(lambda leaf: list(getattr(leaf, "shape", [])), value))
