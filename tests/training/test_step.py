"""The tokenizer's step: who moves whom between the encoders and the network of the CLUB bound."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bbqrec_jax.tokenizer import step as steps
from bbqrec_jax.tokenizer.club import ClubNetwork, Disentangling
from bbqrec_jax.tokenizer.losses import tokenizer_loss
from bbqrec_jax.tokenizer.model import Tokenizer
from bbqrec_jax.tokenizer.settings import LossWeights, TokenizerSettings
from bbqrec_jax.tokenizer.state import TokenizerState, even_usage

MODALITIES = (("text", 6), ("image", 5))
NAMES = tuple(name for name, _ in MODALITIES)
WIDTH = 4


@pytest.fixture(scope="module")
def tokenizer():
  settings = TokenizerSettings(MODALITIES, num_items=9, code_width=WIDTH, num_levels=2, num_codes=4, hidden=(8,))
  return Tokenizer(settings)


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(0)

  def rows(*shape):
    features = {name: rng.normal(size=(*shape, width)).astype(np.float32) for name, width in MODALITIES}
    return features, {name: rng.random(shape) < 0.8 for name in NAMES}

  features, present = rows(8)
  history_features, history_present = rows(2, 4)
  arrays = {
    "items": np.arange(8),
    "features": features,
    "present": present,
    "history_items": np.array([[0, 3, 5, 1], [2, 4, 6, 0]]),
    "history_features": history_features,
    "history_present": history_present,
    "segments": np.array([[1, 1, 1, 1], [1, 1, 2, 2]]),
    "positions": np.array([[0, 1, 2, 3], [0, 1, 0, 1]]),
  }
  return jax.tree.map(jnp.asarray, arrays)


@pytest.fixture(scope="module")
def disentangling():
  return Disentangling(ClubNetwork(NAMES, WIDTH), optax.adam(1e-2), steps=5)


@pytest.fixture(scope="module")
def network_params(disentangling):
  zeros = {name: jnp.zeros((1, WIDTH)) for name in NAMES}
  return disentangling.network.init(jax.random.key(1), zeros)["params"]


def largest(tree):
  return max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree))


def test_the_bound_moves_both_encoders_and_not_its_own_network(
  tokenizer, batch, disentangling, network_params, random_params
):
  params = random_params(tokenizer, batch)
  only_bound = LossWeights(**dict.fromkeys(vars(LossWeights()), 0.0) | {"disentangle": 1.0})
  weighted = Tokenizer(dataclasses.replace(tokenizer.settings, weights=only_bound))

  def loss(params, network):
    bound = disentangling.bound(network, axis_name=None)
    return tokenizer_loss(weighted, params, batch, bound=bound)[0]

  gradient, network_gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, network_params)
  for name in NAMES:
    assert largest(gradient[f"behaviour_encoders_{name}"]) > 0
    assert largest(gradient[f"specific_encoders_{name}"]) > 0
    assert largest(gradient[f"decoders_{name}"]) == 0
  assert largest(network_gradient) == 0


def test_the_latents_that_the_network_is_fitted_to_carry_no_gradient(tokenizer, batch, random_params):
  params = random_params(tokenizer, batch)

  def total(params):
    output = tokenizer_loss(tokenizer, params, batch)[1]
    return sum(jnp.sum(output.quantized[name]) + jnp.sum(output.specific[name]) for name in NAMES)

  assert largest(jax.jit(jax.grad(total))(params)) == 0


def test_likelihood_steps_raise_the_likelihood_and_ignore_absent_rows(disentangling, network_params):
  rng = np.random.default_rng(2)
  quantized = {name: jnp.asarray(rng.normal(size=(64, WIDTH)).astype(np.float32)) for name in NAMES}
  specific = {name: 0.5 * quantized[name] for name in NAMES}
  present = {name: jnp.arange(64) % 4 != 0 for name in NAMES}
  spoilt = {name: jnp.where(present[name][:, None], specific[name], 1e6) for name in NAMES}
  params, state = network_params, disentangling.optimizer.init(network_params)
  likelihoods = []
  for _ in range(3):
    params, state, likelihood = disentangling.update(params, state, quantized, spoilt, present, axis_name=None)
    likelihoods.append(float(likelihood))
  assert likelihoods == sorted(likelihoods)
  assert likelihoods[-1] > likelihoods[0] + 0.1
  clean = disentangling.update(
    network_params, disentangling.optimizer.init(network_params), quantized, specific, present, axis_name=None
  )
  assert float(clean[2]) == likelihoods[0]


def test_a_step_moves_the_network_by_its_own_optimiser_alone(
  tokenizer, batch, network_params, random_params, monkeypatch
):
  settings = dataclasses.replace(tokenizer.settings, warmup_steps=0, revival_threshold=0.0)
  frozen = Disentangling(ClubNetwork(NAMES, WIDTH), optax.sgd(0.0), steps=2)
  fitted = Disentangling(ClubNetwork(NAMES, WIDTH), optax.sgd(0.1), steps=2)
  optimizer = optax.sgd(0.1)
  params = random_params(tokenizer, batch)

  def after(disentangling):
    state = TokenizerState.create(
      params, optimizer, seed=0, usage=even_usage(tokenizer.settings.codebook_shape), club=network_params,
      club_opt_state=disentangling.optimizer.init(network_params),
    )  # fmt: skip
    monkeypatch.setattr(steps, "make_disentangling", lambda settings: disentangling)
    step = steps.make_tokenizer_step(Tokenizer(settings), optimizer)
    return jax.jit(lambda state: step(state, None, batch, axis_name=None))(state)

  still, metrics = after(frozen)
  moved, _ = after(fitted)
  assert largest(jax.tree.map(jnp.subtract, still.club, network_params)) == 0
  assert largest(jax.tree.map(jnp.subtract, moved.club, network_params)) > 0
  # The main step of a batch comes before the network's: how the network moves cannot reach it.
  assert largest(jax.tree.map(jnp.subtract, moved.params, still.params)) == 0
  assert np.isfinite(float(metrics["disentangle"]))
  assert np.isfinite(float(metrics["club_likelihood"]))
