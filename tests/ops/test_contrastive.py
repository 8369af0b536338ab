"""InfoNCE and masked means against NumPy, and over four devices against one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.ops.contrastive import following, info_nce, normalize
from bbqrec_jax.ops.reduction import masked_mean

DEVICES = 4
BATCH, WIDTH = 12, 5

_info_nce = jax.jit(info_nce, static_argnames="axis_name")
_gradients = jax.jit(jax.grad(lambda *data: info_nce(*data)[0], argnums=(0, 1)))


def batch(seed=0):
  """Queries, targets, their items (several occur twice), and a mask that leaves the devices unequal counts."""
  rng = np.random.default_rng(seed)
  queries, targets = rng.normal(size=(2, BATCH, WIDTH)).astype(np.float32)
  ids = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 8, 7])
  valid = np.array([1, 1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0], bool)
  return queries, targets, ids, valid


def oracle(queries, targets, ids, valid, temperature=0.07):
  """(loss, accuracy) by an explicit loop in float64."""
  queries, targets = queries.astype(np.float64), targets.astype(np.float64)
  losses, hits = [], []
  for i in np.flatnonzero(valid):
    negatives = [j for j in np.flatnonzero(valid) if ids[j] != ids[i]]
    scores = np.array([
      queries[i] @ targets[j] / np.linalg.norm(queries[i]) / np.linalg.norm(targets[j]) / temperature
      for j in [i, *negatives]
    ])  # fmt: skip
    losses.append(np.log(np.exp(scores - scores[0]).sum()))
    hits.append((scores[1:] < scores[0]).all())
  return np.mean(losses), np.mean(hits)


def test_the_next_item_stands_one_place_on_where_that_is_the_same_history():
  segments = np.array([[1, 1, 2, 2], [2, 3, 0, 0], [1, 0, 0, 1]])
  place, known = following(jnp.asarray(segments))
  assert np.flatnonzero(known).tolist() == [0, 2], "no row's end leads on, to its own start or to the next row's"
  assert_array_equal(place[known], [1, 3])


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_info_nce_equals_the_formula(temperature):
  data = batch()
  loss, aux = _info_nce(*map(jnp.asarray, data), temperature=temperature)
  expected, accuracy = oracle(*data, temperature)
  assert_allclose(loss, expected, rtol=1e-5)
  assert_allclose(aux["accuracy"], accuracy, rtol=1e-6)


def row_loss(queries, targets, negatives, row):
  """The loss of one query against the targets that `negatives` [B] bool names, in float64."""
  unit = [x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, targets)]
  scores = unit[0][row] @ unit[1].T / 0.07
  return np.log1p(np.exp(scores[negatives] - scores[row]).sum())


def test_the_same_item_elsewhere_in_the_batch_is_no_negative():
  queries, targets, _, _ = batch()
  ids = np.arange(BATCH)
  # A thirteenth row: the first row's item again, with a target that the first query points straight at.
  more_queries, more_targets = np.concatenate([queries, queries[:1]]), np.concatenate([targets, queries[:1]])
  rows = np.arange(BATCH + 1)
  others = [row_loss(more_queries, more_targets, rows != row, row) for row in range(1, BATCH)]
  repeated = row_loss(more_queries, more_targets, (rows != 0) & (rows != BATCH), BATCH)
  without = row_loss(queries, targets, ids != 0, 0)
  valid = jnp.ones(BATCH + 1, bool)

  same, _ = _info_nce(jnp.asarray(more_queries), jnp.asarray(more_targets), jnp.append(ids, ids[0]), valid)
  assert_allclose(same, np.mean([without, *others, repeated]), rtol=1e-5)
  other, _ = _info_nce(jnp.asarray(more_queries), jnp.asarray(more_targets), jnp.append(ids, BATCH), valid)
  against_itself = row_loss(more_queries, more_targets, rows != 0, 0)
  assert against_itself > without + 1
  assert_allclose(
    other, np.mean([against_itself, *others, row_loss(more_queries, more_targets, rows != BATCH, BATCH)]), rtol=1e-5
  )


def test_a_batch_of_one_item_has_no_negative_and_no_loss():
  queries, targets, ids, valid = batch()

  data = queries, targets, np.full_like(ids, 6), valid
  assert _info_nce(*data)[0] == 0
  for gradient in _gradients(*data):
    assert_array_equal(gradient, np.zeros_like(queries))


def test_invalid_rows_do_not_change_the_loss_even_when_nan():
  queries, targets, ids, valid = batch()
  expected, aux = _info_nce(*(jnp.asarray(x[valid]) for x in (queries, targets, ids, valid)))
  for garbage in (1e6, np.nan):
    dirty_queries, dirty_targets = queries.copy(), targets.copy()
    dirty_queries[~valid], dirty_targets[~valid] = garbage, garbage
    loss, dirty_aux = _info_nce(*map(jnp.asarray, (dirty_queries, dirty_targets, ids, valid)))
    assert_allclose(loss, expected, rtol=1e-6)
    assert_allclose(dirty_aux["accuracy"], aux["accuracy"], rtol=1e-6)


def test_invalid_rows_do_not_change_gradients():
  queries, targets, ids, valid = batch()
  dirty = [np.where(valid[:, None], x, np.float32(1e6)) for x in (queries, targets)]
  for clean, other in zip(_gradients(queries, targets, ids, valid), _gradients(*dirty, ids, valid), strict=True):
    assert_array_equal(np.asarray(other)[~valid], 0)
    assert_allclose(np.asarray(other)[valid], np.asarray(clean)[valid], atol=1e-6)


def test_info_nce_of_no_valid_row_is_zero():
  queries, targets, ids, valid = batch()
  loss, aux = _info_nce(*map(jnp.asarray, (queries, targets, ids, valid & False)))
  assert loss == 0
  assert aux["accuracy"] == 0


@pytest.mark.usefixtures("four_devices")
def test_info_nce_over_four_devices_equals_one_in_value_and_gradient():
  queries, targets, ids, valid = map(jnp.asarray, batch())
  rng = np.random.default_rng(9)
  params = {name: jnp.asarray(rng.normal(size=(WIDTH, WIDTH)), jnp.float32) for name in ("queries", "targets")}

  def loss(params, queries, targets, ids, valid, axis_name=None):
    return info_nce(queries @ params["queries"], targets @ params["targets"], ids, valid, axis_name=axis_name)

  def one_share(params, *data):
    (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(params, *data, axis_name="devices")
    return jax.lax.psum((value, aux, gradient), "devices")

  split = [x.reshape(DEVICES, BATCH // DEVICES, *x.shape[1:]) for x in (queries, targets, ids, valid)]
  value, aux, gradient = jax.pmap(one_share, axis_name="devices", in_axes=(None, 0, 0, 0, 0))(params, *split)
  (expected, expected_aux), expected_gradient = jax.value_and_grad(loss, has_aux=True)(
    params, queries, targets, ids, valid
  )
  for device in range(DEVICES):
    assert_allclose(value[device], expected, rtol=1e-5)
    assert_allclose(aux["accuracy"][device], expected_aux["accuracy"], rtol=1e-6)
    for name in params:
      assert np.abs(expected_gradient[name]).max() > 1e-2
      assert_allclose(gradient[name][device], expected_gradient[name], rtol=1e-4, atol=1e-5)


def test_queries_and_targets_of_different_shapes_are_refused_with_both():
  with pytest.raises(ValueError, match=r"\(4, 3\).*\(4, 2\)"):
    info_nce(jnp.zeros((4, 3)), jnp.zeros((4, 2)), jnp.arange(4), jnp.ones(4, bool))


def test_normalize_gives_unit_rows_in_float32():
  x = np.random.default_rng(1).normal(size=(4, 3, 5))
  expected = x / np.linalg.norm(x, axis=-1, keepdims=True)
  assert_allclose(normalize(jnp.asarray(x, jnp.float32)), expected, atol=1e-6)
  assert normalize(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.float32


def test_normalize_keeps_a_zero_row_with_a_zero_gradient_beside_rows_with_the_true_one():
  x = np.array([[0, 0, 0], [1, 2, 2]], np.float32)
  cotangent = np.array([[1, -2, 3], [3, 0, 0]], np.float32)
  value, pull = jax.vjp(normalize, jnp.asarray(x))
  (gradient,) = pull(jnp.asarray(cotangent))
  assert_array_equal(value[0], 0)
  assert_array_equal(gradient[0], 0)
  unit = x[1] / 3
  assert_allclose(gradient[1], (cotangent[1] - unit * (unit @ cotangent[1])) / 3, atol=1e-6)


def test_masked_mean_equals_the_mean_of_valid_entries_and_is_zero_without_any():
  values = np.array([[1, np.nan, 4], [np.inf, 2, 8]], np.float32)
  valid = np.array([[1, 0, 1], [0, 1, 0]], bool)
  assert_allclose(masked_mean(jnp.asarray(values), jnp.asarray(valid)), 7 / 3, rtol=1e-6)
  gradient = jax.grad(masked_mean)(jnp.asarray(values), jnp.asarray(valid))
  assert_allclose(gradient, valid / 3, rtol=1e-6)
  assert masked_mean(jnp.asarray(values), jnp.zeros((2, 3), bool)) == 0


@pytest.mark.usefixtures("four_devices")
def test_shares_of_masked_mean_sum_to_the_global_mean_however_uneven_the_devices():
  values = np.random.default_rng(2).normal(size=(DEVICES, 3)).astype(np.float32)
  valid = np.array([[1, 1, 1], [0, 0, 0], [0, 1, 0], [1, 0, 1]], bool)

  def share(scale, values, valid):
    return masked_mean(scale * values, valid, axis_name="devices")

  shares, gradients = jax.pmap(jax.value_and_grad(share), axis_name="devices", in_axes=(None, 0, 0))(
    jnp.asarray(2.0), jnp.asarray(values), jnp.asarray(valid)
  )
  assert_allclose(np.sum(shares), 2 * values[valid].mean(), rtol=1e-5)
  assert_allclose(np.sum(gradients), values[valid].mean(), rtol=1e-5)
  assert shares[1] == 0


def test_values_and_mask_of_different_shapes_are_refused_with_both():
  with pytest.raises(ValueError, match=r"\(4, 2\).*\(4,\)"):
    masked_mean(jnp.zeros((4, 2)), jnp.ones(4, bool))
