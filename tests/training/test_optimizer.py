"""The schedule in closed form, and what clipping and weight decay reach."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bbqrec_jax.training.optimizer import make_optimizer, make_schedule


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
  schedule = make_schedule(settings, total_steps=60)
  values = [float(schedule(step)) for step in range(70)]
  expected = [expected_rate(step, peak=3e-3, warmup=warmup, total=60) for step in range(70)]
  # A few float32 roundings, and the float32 cosine near its zero.
  np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-9)


def test_schedule_ends_at_a_hundredth():
  schedule = make_schedule(make_settings(), total_steps=60)
  assert float(schedule(60)) == pytest.approx(3e-5, rel=1e-5)


def test_a_warm_up_longer_than_the_run_only_rises():
  schedule = make_schedule(make_settings(warmup_steps=100), total_steps=20)
  np.testing.assert_allclose([float(schedule(step)) for step in range(20)], 3e-3 * np.arange(20) / 20, rtol=1e-6)


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
  for name, part in direction.items():
    np.testing.assert_allclose(means[name], 0.1 * kept * part / length, rtol=1e-5)
    np.testing.assert_allclose(squares[name], 0.02 * np.square(kept * part / length), rtol=1e-4)


def test_the_warm_up_begins_at_zero():
  params = make_params()
  optimizer = make_optimizer(make_settings(), total_steps=100)
  updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.ones_like, params), jax.jit(optimizer.init)(params), params)
  assert all(np.all(np.asarray(leaf) == 0.0) for leaf in jax.tree.leaves(updates))
