"""Cross-entropy over a catalogue in turns, and of drawn items, against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from bbqrec_jax.ops.softmax import Raised, cross_entropy, sampled_cross_entropy, weighted_cross_entropy

POSITIONS, ITEMS, WIDTH = 11, 40, 6


def inputs():
  rng = np.random.default_rng(0)
  states, vectors = rng.normal(size=(POSITIONS, WIDTH)), rng.normal(size=(ITEMS, WIDTH))
  return states.astype(np.float32), vectors.astype(np.float32), rng.integers(ITEMS, size=POSITIONS)


def oracle(states, vectors, targets):
  logits = states.astype(np.float64) @ vectors.astype(np.float64).T
  return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(targets)), targets]


# All at once, in turns that come out even and that do not, one position at a time, and less than one position.
@pytest.mark.parametrize("max_logits", [10**6, POSITIONS * ITEMS, 4 * ITEMS, 3 * ITEMS + 5, ITEMS, 1])
def test_it_is_the_cross_entropy_and_its_gradient_however_few_logits_are_allowed(max_logits):
  states, vectors, targets = inputs()
  loss = functools.partial(cross_entropy, max_logits=max_logits)
  assert_allclose(jax.jit(loss)(states, vectors, targets), oracle(states, vectors, targets), rtol=1e-5)
  weights = np.random.default_rng(1).normal(size=POSITIONS).astype(np.float32)
  gradients = jax.jit(jax.grad(lambda *data: jnp.sum(weights * loss(*data, targets)), argnums=(0, 1)))(states, vectors)
  logits = states.astype(np.float64) @ vectors.T
  share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  share[np.arange(POSITIONS), targets] -= 1
  share *= weights[:, None]
  assert_allclose(gradients[0], share @ vectors, atol=1e-4)
  assert_allclose(gradients[1], share.T @ states, atol=1e-4)


@pytest.mark.parametrize("max_logits", [0, POSITIONS * ITEMS, 4 * ITEMS, 3 * ITEMS + 5, 1])
def test_the_weighted_sum_and_its_gradient_however_few_logits_are_allowed(max_logits):
  states, vectors, targets = inputs()
  weights = np.random.default_rng(1).uniform(size=POSITIONS).astype(np.float32)
  weights[[2, 7]] = 0
  expected = np.sum(weights * oracle(states, vectors, targets))
  logits = states.astype(np.float64) @ vectors.T
  share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  share[np.arange(POSITIONS), targets] -= 1
  share *= weights[:, None]
  states[7] = np.nan  # Padding may hold anything.
  loss = functools.partial(weighted_cross_entropy, max_logits=max_logits)
  assert_allclose(jax.jit(loss)(states, vectors, targets, weights), expected, rtol=1e-5)
  # As a part of a larger loss, whose factor reaches the gradient.
  both = jax.value_and_grad(lambda *data: 3 * loss(*data, targets, weights), argnums=(0, 1))
  value, gradients = jax.jit(both)(states, vectors)
  assert_allclose(value, 3 * expected, rtol=1e-5)
  assert_allclose(gradients[0], 3 * share @ vectors, atol=1e-4)
  states[7] = 0
  assert_allclose(gradients[1], 3 * share.T @ states, atol=1e-4)


def test_the_weighted_sum_of_bfloat16_is_that_of_the_rounded_numbers():
  states, vectors, targets = inputs()
  weights = np.full(POSITIONS, 1 / POSITIONS, np.float32)
  loss = jax.value_and_grad(lambda *data: weighted_cross_entropy(*data, targets, weights), argnums=(0, 1))
  rounded = [jnp.asarray(array, jnp.bfloat16) for array in (states, vectors)]
  value, gradients = loss(*rounded)
  expected, exact = loss(*(array.astype(jnp.float32) for array in rounded))
  assert value.dtype == jnp.float32
  assert_allclose(value, expected, rtol=1e-3)
  for got, gradient in zip(gradients, exact, strict=True):
    assert got.dtype == jnp.bfloat16
    assert_allclose(got.astype(jnp.float32), gradient, atol=2e-2 * float(jnp.max(jnp.abs(gradient))))


@pytest.mark.parametrize("max_logits", [0, 4 * ITEMS, 1])
def test_what_is_raised_is_added_to_the_logits_and_has_a_gradient(max_logits):
  states, vectors, targets = inputs()
  rng = np.random.default_rng(4)
  weights = rng.uniform(size=POSITIONS).astype(np.float32)
  items = np.stack([rng.permutation(ITEMS)[:5] for _ in range(POSITIONS)])
  items[:, 0], items[3] = np.where(np.arange(POSITIONS) % 2, targets, -1), -1
  items = np.where((items == targets[:, None]) & (np.arange(5) > 0), -1, items)  # Each once.

  def expected(states, by):
    logits = states.astype(np.float64) @ vectors.astype(np.float64).T
    for row, own in enumerate(items):
      logits[row, own[own >= 0]] += by
    return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(POSITIONS), targets]

  by = -1.4
  each = cross_entropy(states, vectors, targets, raised=Raised(items, by), max_logits=max_logits or 10**6)
  assert_allclose(each, expected(states, by), rtol=1e-5)

  def loss(states, vectors, by):
    raised = Raised(jnp.asarray(items), by)
    return 2 * weighted_cross_entropy(states, vectors, targets, weights, raised=raised, max_logits=max_logits)

  value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(states, vectors, jnp.float32(by))
  assert_allclose(value, 2 * np.sum(weights * expected(states, by)), rtol=1e-5)
  slope = np.sum(weights * (expected(states, by + 1e-4) - expected(states, by - 1e-4))) / 1e-4
  assert_allclose(gradients[2], slope, rtol=1e-4)
  plain = jax.jit(
    jax.grad(
      lambda *data: 2 * jnp.sum(weights * cross_entropy(*data, targets, raised=Raised(items, by))), argnums=(0, 1)
    )
  )
  for got, wanted in zip(gradients[:2], plain(states, vectors), strict=True):
    assert_allclose(got, wanted, atol=1e-4)


def test_logits_never_exceed_what_is_allowed():
  states, vectors, targets = inputs()
  allowed = 3 * ITEMS
  program = jax.jit(jax.grad(lambda *data: cross_entropy(*data, targets, max_logits=allowed).sum(), argnums=(0, 1)))
  text = program.lower(states, vectors).as_text()
  assert f"{POSITIONS}x{ITEMS}x" not in text
  assert f"3x{ITEMS}x" in text


def test_every_item_drawn_once_gives_the_cross_entropy_itself():
  states, vectors, targets = inputs()
  drawn = np.random.default_rng(2).permutation(ITEMS)
  got = sampled_cross_entropy(states, vectors[targets], vectors[drawn], targets, drawn, num_items=ITEMS)
  assert_allclose(got, oracle(states, vectors, targets), rtol=1e-5)


def test_drawn_items_estimate_the_sum_over_all_others_without_bias():
  states, vectors, targets = inputs()
  draws = np.random.default_rng(3).integers(ITEMS, size=(20_000, 8))

  @jax.jit
  @jax.vmap
  def one(drawn):
    return sampled_cross_entropy(states, vectors[targets], vectors[drawn], targets, drawn, num_items=ITEMS)

  vectors, targets, states = map(jnp.asarray, (vectors, targets, states))
  others = np.exp(np.asarray(one(jnp.asarray(draws)), np.float64)) - 1  # Over the target's own exp(logit).
  expected = np.exp(oracle(*inputs())) - 1
  spread = others.std(axis=0) / np.sqrt(len(draws))
  assert np.all(np.abs(others.mean(axis=0) - expected) < 5 * spread)
  assert np.all(spread < 0.05 * expected)


def test_a_draw_of_the_target_alone_leaves_nothing_to_compete_with():
  states, vectors, targets = inputs()
  drawn = np.full(3, targets[0])
  got = sampled_cross_entropy(states, vectors[targets], vectors[drawn], targets, drawn, num_items=ITEMS)
  assert got[0] == 0
  assert np.isfinite(got).all()
