"""The schedule in closed form, and what clipping and weight decay reach."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bbqrec_jax.layers.padding import pad_rows
from bbqrec_jax.training.optimizer import apart, learning_rate, make_optimizer, together


def make_settings(**changes):
  fields = {
    "learning_rate": 3e-3, "warmup_steps": 10, "weight_decay": 0.1, "clip_norm": 1.0, "b2": 0.98
  }  # fmt: skip
  return types.SimpleNamespace(**(fields | changes))


def expected_rate(step, *, peak, warmup, total):
  if step < warmup:
    return peak * step / warmup
  progress = min((step - warmup) / (total - warmup), 1.0)
  return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_schedule_values(warmup):
  settings = make_settings(warmup_steps=warmup)
  values = [float(learning_rate(settings, step, 60)) for step in range(70)]
  expected = [expected_rate(step, peak=3e-3, warmup=warmup, total=60) for step in range(70)]
  # A few float32 roundings, and the float32 cosine near its zero.
  np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-9)


def test_schedule_ends_at_a_hundredth():
  assert float(learning_rate(make_settings(), 60, 60)) == pytest.approx(3e-5, rel=1e-5)


def test_a_warm_up_longer_than_the_run_only_rises():
  values = [float(learning_rate(make_settings(warmup_steps=100), step, 20)) for step in range(20)]
  np.testing.assert_allclose(values, 3e-3 * np.arange(20) / 20, rtol=1e-6)


def make_params():
  return {
    "layer": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0)},
    "norm": {"scale": jnp.full(3, 2.0)},
    "attention": {"query": {"kernel": jnp.full((3, 2, 2), 2.0), "bias": jnp.full((2, 2), 2.0)}},
    "embedding": jnp.full((4, 3), 2.0),
    "item_embedding": {"embedding": jnp.full((4, 3), 2.0)},
    "codebooks": jnp.full((2, 4, 3), 2.0),
    "similarity_tables": jnp.full((1, 2, 5), 2.0),
    "kernel_of_nothing": jnp.full((2, 2), 2.0),
  }


def test_only_kernels_decay():
  params = make_params()
  optimizer = make_optimizer(make_settings(warmup_steps=0), total_steps=10)
  # Without a gradient AdamW moves by its decay alone: -learning_rate x weight_decay x parameter.
  updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, params), jax.jit(optimizer.init)(params), params)
  after = jax.jit(optax.apply_updates)(params, updates)
  for path, leaf in jax.tree_util.tree_leaves_with_path(after):
    decays = path[-1].key == "kernel"
    np.testing.assert_allclose(leaf, 2.0 * (1 - 3e-3 * 0.1) if decays else 2.0, rtol=1e-7, err_msg=str(path))


def test_first_step_is_that_of_adam():
  # At its first step Adam moves each parameter by the learning rate against its gradient's sign.
  params = {"bias": jnp.zeros(4)}
  gradients = {"bias": jnp.array([0.3, -0.2, 0.1, 0.5])}
  optimizer = make_optimizer(make_settings(warmup_steps=0), total_steps=10)
  updates, _ = jax.jit(optimizer.update)(gradients, jax.jit(optimizer.init)(params), params)
  np.testing.assert_allclose(updates["bias"], -3e-3 * np.sign(gradients["bias"]), rtol=1e-5)


@pytest.mark.parametrize(("norm", "kept"), [(50.0, 0.5), (0.2, 0.2)])
def test_gradients_are_clipped_by_their_global_norm(norm, kept):
  rng = np.random.default_rng(0)
  direction = {"kernel": rng.normal(size=(4, 4)), "bias": rng.normal(size=4)}
  length = np.sqrt(sum(np.sum(np.square(part)) for part in direction.values()))
  gradients = {name: jnp.asarray(part / length * norm, jnp.float32) for name, part in direction.items()}
  optimizer = make_optimizer(make_settings(clip_norm=0.5), total_steps=10)
  params = jax.tree.map(jnp.zeros_like, gradients)
  _, state = jax.jit(optimizer.update)(gradients, jax.jit(optimizer.init)(params), params)
  # Adam's first moment after one step is a tenth of the gradient it was given, its second a fiftieth of the square.
  means, squares = optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
  means, squares = apart(means, params), apart(squares, params)
  for name, part in direction.items():
    np.testing.assert_allclose(means[name], 0.1 * kept * part / length, rtol=1e-5)
    np.testing.assert_allclose(squares[name], 0.02 * np.square(kept * part / length), rtol=1e-4)


def test_the_warm_up_begins_at_zero():
  params = make_params()
  optimizer = make_optimizer(make_settings(), total_steps=100)
  updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.ones_like, params), jax.jit(optimizer.init)(params), params)
  assert all(np.all(np.asarray(leaf) == 0.0) for leaf in jax.tree.leaves(updates))


def test_updates_are_those_of_optax_array_by_array():
  rng = np.random.default_rng(0)
  large = {"table": {"embedding": np.zeros((700, 100))}, "wide": {"kernel": np.zeros((300, 300))}}
  params = jax.tree.map(lambda leaf: np.float32(rng.normal(size=leaf.shape)), make_params() | large)
  settings = make_settings()
  schedule = functools.partial(learning_rate, settings, total_steps=30)
  decays = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
  theirs = optax.chain(
    optax.clip_by_global_norm(settings.clip_norm),
    optax.adamw(schedule, b2=settings.b2, weight_decay=settings.weight_decay, mask=decays),
  )
  ours = make_optimizer(settings, total_steps=30)
  results = []
  for optimizer in (theirs, ours):
    state, now, draw = optimizer.init(params), params, np.random.default_rng(1)
    for _ in range(5):
      gradients = jax.tree.map(lambda leaf, draw=draw: np.float32(draw.normal(size=leaf.shape)), params)
      updates, state = optimizer.update(gradients, state, now)
      now = optax.apply_updates(now, updates)
    results.append(now)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-7), *results)


def test_small_arrays_go_together_and_come_apart():
  wide = np.arange(70_000, dtype=np.float32).reshape(-1, 10)
  spread = pad_rows(np.arange(30, dtype=np.float32).reshape(10, 3), 4)  # As a mesh of four devices has it.
  params = make_params() | {"table": wide, "spread": {"kernel": spread}}
  found = together(params)
  assert {kind: {name: part.shape for name, part in parts.items()} for kind, parts in found.items()} == {
    "kernel": {"small": (1, 6 + 12 + 30)},
    "other": {"small": (1, 3 + 3 + 4 + 12 + 12 + 24 + 10 + 4), "['table']": (7000, 10)},
  }
  back = apart(found, params)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)
