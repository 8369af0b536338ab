"""The CLUB bound against brute force and against mutual informations known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bbqrec_jax.ops import club
from bbqrec_jax.ops.club import gaussian_log_likelihood

club_full = jax.jit(club.club_full, static_argnames="axis_name")


def draw(seed, rows, width):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=(rows, width)).astype(np.float32)) for _ in range(3)]


def all_pairs_bound(mean, log_variance, y, valid):
  """Every pair of valid rows, in float64."""
  mean, log_variance, y = (np.asarray(x, np.float64)[np.asarray(valid)] for x in (mean, log_variance, y))

  def log_q(i, j):
    return -0.5 * np.sum((y[j] - mean[i]) ** 2 * np.exp(-log_variance[i]) + log_variance[i])

  rows = range(len(y))
  positive = np.mean([log_q(i, i) for i in rows])
  return positive - np.mean([[log_q(i, j) for j in rows] for i in rows])


def correlated(rho, rows, width, seed):
  """x, y with correlation rho in each of `width` dimensions: I(x; y) = -width / 2 log(1 - rho^2)."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(rows, width))
  y = rho * x + np.sqrt(1 - rho**2) * rng.normal(size=(rows, width))
  return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


def fitted_gaussian(x, y, steps=400):
  """A linear mean and a constant variance, fitted by likelihood: the right family for jointly Gaussian data."""
  width = x.shape[1]
  params = {"weight": jnp.zeros((width, width)), "log_variance": jnp.zeros(width)}
  optimizer = optax.adam(0.02)

  def apply(params):
    return x @ params["weight"], jnp.broadcast_to(jnp.tanh(params["log_variance"][None]) * 4.0, y.shape)

  @jax.jit
  def fit(params):
    def step(carry, _):
      params, state = carry
      gradient = jax.grad(lambda p: -jnp.mean(gaussian_log_likelihood(*apply(p), y)))(params)
      updates, state = optimizer.update(gradient, state)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)[0][0]

  return apply(fit(params))


def test_full_bound_equals_all_pairs_and_ignores_invalid_rows():
  mean, log_variance, y = draw(0, 12, 5)
  valid = jnp.arange(12) % 3 != 1
  expected = all_pairs_bound(mean, log_variance, y, valid)
  spoilt = jnp.where(valid[:, None], y, jnp.nan)
  np.testing.assert_allclose(club_full(mean, log_variance, spoilt, valid), expected, rtol=1e-5)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_fitted_bound_is_zero_when_independent_and_above_the_truth_when_not(rho):
  width, rows = 3, 4000
  x, y = correlated(rho, rows, width, seed=3)
  bound = float(club_full(*fitted_gaussian(x, y), y, jnp.ones(rows, bool)))
  truth = -width / 2 * np.log(1 - rho**2)
  if rho == 0.0:
    assert abs(bound) < 0.05
  else:
    assert bound > truth


def test_bound_goes_negative_and_keeps_its_gradient_when_q_is_wrong():
  x, y = correlated(0.9, 200, 2, seed=4)

  def bound(y):
    return club_full(-x, jnp.zeros_like(y), y, jnp.ones(200, bool))

  assert float(bound(y)) < -0.5
  assert float(jnp.max(jnp.abs(jax.grad(bound)(y)))) > 0


@pytest.mark.usefixtures("four_devices")
def test_full_bound_over_four_devices_equals_one_in_value_and_gradient():
  mean, log_variance, y = draw(5, 16, 4)
  valid = jnp.asarray(np.random.default_rng(6).random(16) < 0.6)

  def loss(scale, mean, log_variance, y, valid, axis_name=None):
    return club_full(mean * scale, log_variance, y * scale, valid, axis_name=axis_name)

  value, gradient = jax.value_and_grad(loss)(1.3, mean, log_variance, y, valid)
  split = [a.reshape(4, 4, *a.shape[1:]) for a in (mean, log_variance, y, valid)]

  def shared(scale, *rows):
    share = jax.value_and_grad(lambda s: loss(s, *rows, axis_name="batch"))(scale)
    return jax.lax.psum(share, "batch")

  values, gradients = jax.pmap(shared, axis_name="batch", in_axes=(None, 0, 0, 0, 0))(1.3, *split)
  np.testing.assert_allclose(values, np.full(4, value), rtol=1e-5)
  np.testing.assert_allclose(gradients, np.full(4, gradient), rtol=1e-5)
