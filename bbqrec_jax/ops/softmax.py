"""Cross-entropy over a catalogue of items, whole or drawn, without ever holding all logits of a batch."""

import jax
import jax.numpy as jnp


def cross_entropy(states: jax.Array, vectors: jax.Array, targets: jax.Array, *, max_logits: int = 2**26) -> jax.Array:
  """-log softmax(states @ vectors.T)[target], at most `max_logits` logits at a time.

  Where the product is larger, positions are looked at in turns, and the backward pass computes each turn's logits anew.

  Args:
    states: [P, d].
    vectors: [N, d], one an item.
    targets: [P] int.
    max_logits: float32 logits that may be there at once; one position's N always are.

  Returns:
    [P] float32.
  """

  def some(states, targets):
    logits = jnp.dot(states, vectors.T, preferred_element_type=jnp.float32)
    own = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - own

  positions, num_items = states.shape[0], vectors.shape[0]
  turns = -(-positions // max(1, max_logits // num_items))
  if turns == 1:
    return some(states, targets)
  rows = -(-positions // turns)
  missing = turns * rows - positions
  states = jnp.pad(states, ((0, missing), (0, 0))).reshape(turns, rows, -1)
  targets = jnp.pad(targets, (0, missing)).reshape(turns, rows)
  turn = jax.checkpoint(some)
  return jax.lax.map(lambda part: turn(*part), (states, targets)).reshape(-1)[:positions]


def sampled_cross_entropy(
  states: jax.Array,
  target_vectors: jax.Array,
  drawn_vectors: jax.Array,
  targets: jax.Array,
  drawn: jax.Array,
  *,
  num_items: int,
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

  Returns:
    [P] float32.
  """
  own = jnp.sum(states.astype(jnp.float32) * target_vectors.astype(jnp.float32), axis=-1)
  logits = jnp.dot(states, drawn_vectors.T, preferred_element_type=jnp.float32)
  other = drawn[None, :] != targets[:, None]
  count = jnp.maximum(jnp.sum(other, axis=1), 1)
  stands_for = jnp.log((num_items - 1) / count.astype(jnp.float32))
  total = jax.nn.logsumexp(jnp.where(other, logits, -jnp.inf), axis=1) + stands_for
  return jnp.logaddexp(own, total) - own
