"""The product of a dense layer against JAX's own, values and gradients, and what each of its gradients turns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.layers.dense import Dense, DenseGeneral
from bbqrec_jax.ops.products import dense_product, repeat_rows

# Shapes of inputs and kernel, and how many axes are contracted: a layer that widens, one that narrows, heads made, and
# heads joined.
SHAPES = {
  "wider": ((3, 5, 4), (4, 9), 1),
  "narrower": ((3, 5, 9), (9, 4), 1),
  "one row of axes": ((7, 4), (4, 4), 1),
  "to heads": ((3, 5, 4), (4, 2, 3), 1),
  "from heads": ((3, 5, 2, 3), (2, 3, 4), 2),
  "from heads, wider": ((3, 5, 2, 3), (2, 3, 11), 2),
}


def numbers(inputs, count):
  return (tuple(range(inputs.ndim - count, inputs.ndim)), tuple(range(count))), ((), ())


def operands(shapes, dtype=np.float32):
  rng = np.random.default_rng(0)
  return (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_are_those_of_the_plain_product(name):
  *shapes, count = SHAPES[name]
  inputs, kernel = operands(shapes)
  dimension_numbers = numbers(inputs, count)
  ours, pull = jax.vjp(lambda x, w: dense_product(x, w, dimension_numbers), inputs, kernel)
  plain, pull_plain = jax.vjp(lambda x, w: lax.dot_general(x, w, dimension_numbers), inputs, kernel)
  assert_array_equal(ours, plain)
  gradient = jnp.asarray(np.random.default_rng(1).normal(size=ours.shape), jnp.float32)
  for own, expected in zip(pull(gradient), pull_plain(gradient), strict=True):
    assert own.shape == expected.shape
    assert_allclose(own, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_the_narrower_operand_comes_first_in_the_gradient_of_the_kernel(name):
  *shapes, count = SHAPES[name]
  inputs, kernel = operands(shapes)

  def loss(x, w):
    return jnp.sum(jnp.square(dense_product(x, w, numbers(x, count))))

  # The product itself is a call of its own there.
  equations = jax.make_jaxpr(jax.grad(loss, argnums=1))(inputs, kernel).eqns
  (product,) = [equation for equation in equations if equation.primitive.name == "dot_general"]
  rows = int(np.prod(inputs.shape[:-count]))
  first, second = (variable.aval.size // rows for variable in product.invars)
  assert first <= second


@pytest.mark.parametrize("argnum", [0, 1])
def test_a_gradient_that_nobody_asks_for_is_not_formed(argnum):
  inputs, kernel = operands(((3, 5, 4), (4, 9)))

  def of(product):
    return jax.make_jaxpr(jax.grad(lambda x, w: jnp.sum(jnp.square(product(x, w, numbers(x, 1)))), argnums=argnum))(
      inputs, kernel
    )

  ours, plain = (str(of(product)).count("dot_general[") for product in (dense_product, lax.dot_general))
  assert ours == plain == 2


def test_types_stay_and_a_map_over_batches_is_a_loop_over_them():
  inputs, kernel = operands(((3, 5, 4), (4, 9)), jnp.bfloat16)
  out, pull = jax.vjp(lambda x, w: dense_product(x, w, numbers(x, 1)), inputs, kernel)
  assert out.dtype == jnp.bfloat16
  assert [g.dtype for g in pull(out)] == [jnp.bfloat16] * 2

  def gradient(x, w):
    return jax.grad(lambda w: jnp.sum(jnp.square(dense_product(x, w, numbers(x, 1)))))(w)

  inputs, kernel = operands(((3, 5, 4), (4, 9)))
  mapped = jax.vmap(gradient, in_axes=(0, None))(inputs, kernel)
  for row, own in zip(inputs, mapped, strict=True):
    assert_allclose(own, gradient(row, kernel), rtol=1e-5)


def test_the_layers_are_those_of_flax():
  import flax.linen as nn

  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 6)), jnp.float32)
  for own, flax in (
    (Dense(5), nn.Dense(5)),
    (DenseGeneral((2, 4)), nn.DenseGeneral((2, 4))),
    (DenseGeneral(4, axis=(-2, -1), use_bias=False), nn.DenseGeneral(4, axis=(-2, -1), use_bias=False)),
  ):
    params, expected = own.init(jax.random.key(0), x), flax.init(jax.random.key(0), x)
    jax.tree.map(assert_array_equal, params, expected)
    assert_array_equal(own.apply(params, x), flax.apply(expected, x))


@pytest.mark.parametrize(
  "dimension_numbers",
  [(((0,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((1,), (0,)), ((0,), (1,)))],
  ids=["first axis of the inputs", "last of the kernel", "batch axes"],
)
def test_other_products_are_refused(dimension_numbers):
  with pytest.raises(ValueError, match="expected the last axes of the inputs with the first of the kernel"):
    dense_product(jnp.ones((4, 4)), jnp.ones((4, 4)), dimension_numbers)


def test_repeated_rows_are_broadcast_and_their_gradient_is_the_sum_over_the_batch():
  row, gradient = operands(((2, 3, 4), (5, 2, 3, 4)))
  repeated, pull = jax.vjp(lambda row: repeat_rows(row, 5), row)
  assert_array_equal(repeated, np.broadcast_to(row, (5, 2, 3, 4)))
  assert_allclose(pull(gradient)[0], np.sum(gradient, axis=0), rtol=1e-5, atol=1e-6)
