"""FLOPs and compulsory bytes of a function, counted from its trace."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core


def matmul_flops(function: Callable[..., Any], *args: Any) -> float:
  """Floating-point operations in the matrix products of a function: 2 m n k for each, gradients and loops included.

  Elementwise work is left out, as is usual for the FLOPs of a model. Of a branch the dearest side counts; a loop whose
  length is not known while tracing counts once.

  Args:
    function: anything that JAX can trace.
    *args: arrays or `jax.ShapeDtypeStruct`s; nothing is computed.
  """
  return _flops(jax.make_jaxpr(function)(*args).jaxpr)


def _flops(jaxpr: Any) -> float:
  total = 0.0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    elif name == "cond":
      total += max(_flops(branch.jaxpr) for branch in params["branches"])
    else:
      total += (params["length"] if name == "scan" else 1) * sum(_flops(inner) for inner in _inner(params))
  return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
  """The programs within an operation."""
  for value in params.values():
    if isinstance(value, core.ClosedJaxpr):
      yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
      yield value


def compulsory_bytes(function: Callable[..., Any], *args: Any) -> float:
  """Bytes that any implementation moves: every input read once, every output written once."""
  outputs = jax.eval_shape(function, *args)
  return float(sum(_size(leaf) for leaf in jax.tree.leaves((args, outputs))))


def cost(function: Callable[..., Any], *args: Any) -> tuple[float, float]:
  """`matmul_flops` and `compulsory_bytes`."""
  return matmul_flops(function, *args), compulsory_bytes(function, *args)


def _size(leaf: Any) -> int:
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return 8
  return math.prod(leaf.shape) * leaf.dtype.itemsize
