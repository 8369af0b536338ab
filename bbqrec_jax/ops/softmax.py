"""Cross-entropy over a catalogue of items, full or sampled, without holding all logits of a batch at once."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bbqrec_jax.ops.ranking import add_to


class Raised(NamedTuple):
  """Items whose logits have a number added.

  Attributes:
    items: [P, E] int, of each position, each there once; -1 fills.
    by: the number, a float32 scalar.
  """

  items: jax.Array
  by: jax.Array


def cross_entropy(
  states: jax.Array,
  vectors: jax.Array,
  targets: jax.Array,
  *,
  raised: Raised | None = None,
  max_logits: int = 2**26,
) -> jax.Array:
  """-log softmax(states @ vectors.T)[target], at most `max_logits` logits at a time.

  Where the product is larger, positions are looked at in turns, and the backward pass computes each turn's logits anew.
  `weighted_cross_entropy` is faster where only the sum matters.

  Args:
    states: [P, d].
    vectors: [N, d], one per item.
    targets: [P] int.
    raised: what is added to the logits of some items; None adds nothing.
    max_logits: float32 logits that may be there at once; one position's N always are.

  Returns:
    [P] float32.
  """
  items, by = _no_items(targets) if raised is None else raised

  def some(part):
    states, targets, items = part
    logits = add_to(jnp.dot(states, vectors.T, preferred_element_type=jnp.float32), items, by)
    return jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]

  rows = _rows_a_turn(states.shape[0], vectors.shape[0], max_logits)
  if rows == states.shape[0]:
    return some((states, targets, items))
  turns = _in_turns((states, targets, items), rows)
  return jax.lax.map(jax.checkpoint(some), turns).T.reshape(-1)[: states.shape[0]]


def weighted_cross_entropy(
  states: jax.Array,
  vectors: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  raised: Raised | None = None,
  max_logits: int = 0,
) -> jax.Array:
  """Sum over p of weights[p] * -log softmax(states[p] @ vectors.T)[targets[p]], at most `max_logits` logits at a time.

  Because the sum alone leaves, its gradient is known but for one factor as soon as the logits are: both are formed in
  one turn over the positions, in three products of the size of the logits, while those are in the processor's cache.

  Args:
    states: [P, d].
    vectors: [N, d], one per item.
    targets: [P] int.
    weights: [P] float32, 0 or more; positions that weigh nothing may hold anything. No gradient flows to them.
    raised: what is added to the logits of some items; None adds nothing.
    max_logits: float32 logits that may be there at once; one position's N always are. 0: 2^22 on a CPU, where more
      would not stay in its cache, and 2^26 elsewhere.

  Returns:
    A float32 scalar.
  """
  if not max_logits:
    max_logits = 2**22 if jax.default_backend() == "cpu" else 2**26
  rows = _rows_a_turn(states.shape[0], vectors.shape[0], max_logits)
  states = jnp.where(weights[:, None] > 0, states, jnp.zeros((), states.dtype))
  items, by = _no_items(targets) if raised is None else raised
  weights = jax.lax.stop_gradient(weights.astype(jnp.float32))
  return _weighted_sum(states, vectors, targets, weights, items, by.astype(jnp.float32), rows)


def _no_items(targets: jax.Array) -> Raised:
  """Nothing that is raised, for as many positions."""
  return Raised(jnp.zeros((targets.shape[0], 0), jnp.int32), jnp.zeros((), jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _weighted_sum(
  states: jax.Array,
  vectors: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  items: jax.Array,
  by: jax.Array,
  rows: int,
) -> Any:
  raised = Raised(items, by)
  surprise = cross_entropy(states, vectors, targets, raised=raised, max_logits=rows * vectors.shape[0])
  return jnp.sum(weights * surprise)


def _weighted_sum_forward(states, vectors, targets, weights, items, by, rows):
  """The sum, and its gradients with respect to states, vectors, and what is added to the items' logits."""

  def turn(carry, part):
    total, of_vectors, of_by = carry
    states, targets, weights, items = part
    logits = add_to(jnp.dot(states, vectors.T, preferred_element_type=jnp.float32), items, by)
    own = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    highest = jnp.max(logits, axis=1)
    exponentials = jnp.exp(logits - highest[:, None])
    normalizer = jnp.sum(exponentials, axis=1)
    total += jnp.sum(weights * (jnp.log(normalizer) + highest - own))
    share = (weights / normalizer)[:, None]
    among = jnp.take_along_axis(exponentials, jnp.maximum(items, 0), axis=1)
    of_by += jnp.sum(jnp.where(items < 0, 0.0, share * among))
    exponentials = exponentials.astype(vectors.dtype)
    of_states = share * jnp.dot(exponentials, vectors, preferred_element_type=jnp.float32)
    of_vectors += jnp.dot(exponentials.T, (share * states).astype(vectors.dtype), preferred_element_type=jnp.float32)
    return (total, of_vectors, of_by), of_states

  nothing = jnp.zeros((), jnp.float32)
  start = (nothing, jnp.zeros(vectors.shape, jnp.float32), nothing)
  turns = _in_turns((states, targets, weights, items), rows)
  (total, of_vectors, of_by), of_states = jax.lax.scan(turn, start, turns)
  of_by -= jnp.sum(jnp.where(items == targets[:, None], weights[:, None], 0.0))
  of_states = (
    jnp.swapaxes(of_states, 0, 1).reshape(-1, states.shape[1])[: states.shape[0]] - weights[:, None] * vectors[targets]
  )
  of_vectors = of_vectors.at[targets].add(-weights[:, None] * states)
  return total, (of_states.astype(states.dtype), of_vectors.astype(vectors.dtype), of_by)


def _weighted_sum_backward(rows, gradients, factor):
  del rows
  of_states, of_vectors, of_by = gradients
  of_states, of_vectors = ((factor * part).astype(part.dtype) for part in (of_states, of_vectors))
  return of_states, of_vectors, None, None, None, factor * of_by


_weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


def _rows_a_turn(positions: int, num_items: int, max_logits: int) -> int:
  """Positions to look at at once: as even turns as there can be with at most `max_logits` logits each."""
  turns = -(-positions // max(1, max_logits // num_items))
  return -(-positions // turns)


def _in_turns(arrays: tuple[jax.Array, ...], rows: int) -> tuple[jax.Array, ...]:
  """[P, ...] arrays -> [turns, rows, ...], filled up with zeros.

  Neighbours go to different turns: where the positions are spread over devices, each has its share of every turn.
  """

  def split(array):
    missing = -array.shape[0] % rows
    padded = jnp.pad(array, ((0, missing), *((0, 0) for _ in array.shape[1:])))
    return jnp.swapaxes(padded.reshape(rows, padded.shape[0] // rows, *array.shape[1:]), 0, 1)

  return tuple(split(array) for array in arrays)


def sampled_cross_entropy(
  states: jax.Array,
  target_vectors: jax.Array,
  drawn_vectors: jax.Array,
  targets: jax.Array,
  drawn: jax.Array,
  *,
  num_items: int,
  raised: Raised | None = None,
) -> jax.Array:
  """Cross-entropy against items drawn uniformly, each standing for as many as it was drawn from (log-Q correction).

      log(exp(own) + sum over drawn j, not the target, of exp(logit_j) (N - 1) / n_i) - own

  where n_i counts the drawn items that are not position i's target: the sum is an unbiased estimate of that over all
  other items (Bengio & Senecal, 2008; log-Q as in Yi et al., 2019).

  Args:
    states: [P, d].
    target_vectors: [P, d], of the targets.
    drawn_vectors: [n, d], of the drawn items.
    targets: [P] int.
    drawn: [n] int, drawn uniformly with replacement.
    num_items: N.
    raised: what is added to the logits of some items; None adds nothing.

  Returns:
    [P] float32.
  """
  own = jnp.sum(states.astype(jnp.float32) * target_vectors.astype(jnp.float32), axis=-1)
  logits = jnp.dot(states, drawn_vectors.T, preferred_element_type=jnp.float32)
  if raised is not None:
    own += jnp.where(jnp.any(raised.items == targets[:, None], axis=1), raised.by, 0.0)
    logits += jnp.where(jnp.any(raised.items[:, None, :] == drawn[None, :, None], axis=2), raised.by, 0.0)
  other = drawn[None, :] != targets[:, None]
  count = jnp.maximum(jnp.sum(other, axis=1, dtype=jnp.int32), 1)
  stands_for = jnp.log((num_items - 1) / count.astype(jnp.float32))
  total = jax.nn.logsumexp(jnp.where(other, logits, -jnp.inf), axis=1) + stands_for
  return jnp.logaddexp(own, total) - own
