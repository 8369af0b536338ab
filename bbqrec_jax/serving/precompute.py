"""What of a function follows from its first arguments alone, computed once.

A recommender computes the vectors of all items, and sums of them over the trie, for every batch that it ranks: in
training they change with each step. For a server they are constants. XLA would find that out only if the weights stood
in the program; here the split is made where the function is traced, whatever the model is made of.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

# Not worth an array of their own.
_LAYOUT = {"broadcast_in_dim", "convert_element_type", "reshape", "slice", "squeeze", "transpose"}


def _variables(atoms: Sequence[Any]) -> set[Any]:
  return {one for one in atoms if not isinstance(one, Literal)}


def _evaluate(equations: Sequence[Any], values: dict[Any, Any]) -> None:
  """Adds to the values of variables those that equations of a jaxpr give."""
  for equation in equations:
    inputs = [one.val if isinstance(one, Literal) else values[one] for one in equation.invars]
    bound = equation.primitive.get_bind_params(equation.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # As JAX 0.9 or 0.10 has it.
    outputs = equation.primitive.bind(*functions, *inputs, **params)
    values |= zip(equation.outvars, outputs if equation.primitive.multiple_results else [outputs], strict=True)


def _is_fixed(variable: Any) -> bool:
  """Whether a variable's shape is known: it does not depend on how many rows are asked about."""
  return all(isinstance(length, int) for length in variable.aval.shape)


def precompute(
  function: Callable[..., Any], arrays: Mapping[str, np.ndarray], *shapes: Any
) -> tuple[Callable[..., Any], dict[str, np.ndarray]]:
  """Splits a function of arrays and of other arguments, so that what the arrays alone give is computed now.

  Args:
    function: (list of arrays, *arguments) -> a tuple of arrays; it is traced.
    arrays: by name, in the order in which the function takes them.
    *shapes: of the other arguments; they may have symbolic dimensions.

  Returns:
    (rest, needed): `rest(list of needed arrays, *arguments)`, exported for the same shapes, gives what the function
    does. `needed` are those of the arrays that are still read, under their names, and what was computed of them, as
    "computed/0" and on.
  """
  held = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays.values()]
  closed = jax.make_jaxpr(function)(held, *shapes)
  jaxpr = closed.jaxpr
  given, asked = jaxpr.invars[: len(held)], jaxpr.invars[len(held) :]
  known, free, now, later = {*given}, {*jaxpr.constvars}, [], []
  for equation in jaxpr.eqns:
    inputs, fixed = _variables(equation.invars), all(map(_is_fixed, equation.outvars))
    # What no array enters, such as a range of numbers, costs nothing where it is used, and is made in both parts.
    if fixed and inputs <= free:
      free |= {*equation.outvars}
      now.append(equation)
      later.append(equation)
    elif fixed and inputs <= known | free:
      known |= {*equation.outvars}
      now.append(equation)
    else:
      later.append(equation)
  read = _variables(jaxpr.outvars).union(*(_variables(equation.invars) for equation in later))
  for equation in reversed(now.copy()):
    if equation.primitive.name in _LAYOUT and read & {*equation.outvars} and not free & {*equation.outvars}:
      now.remove(equation)
      later.insert(0, equation)
      read |= _variables(equation.invars)
  constants = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  kept = [one for one in given if one in read]
  computed = [one for equation in now for one in equation.outvars if one in read and one not in free]

  @jax.jit
  def once(arrays: Sequence[Any]) -> list[Any]:
    values = dict(constants) | dict(zip(given, arrays, strict=True))
    _evaluate(now, values)
    return [values[one] for one in computed]

  # A model may compute the same thing in several places, which are then told apart by name alone.
  results = list(map(np.asarray, once(list(arrays.values())) if computed else []))
  digests = [(array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).digest()) for array in results]
  distinct = {digest: array for digest, array in zip(digests, results, strict=True)}
  places = [len(kept) + list(distinct).index(digest) for digest in digests]
  names = dict(zip(given, arrays, strict=True))
  needed = {names[one]: arrays[names[one]] for one in kept}
  needed |= {f"computed/{place}": array for place, array in enumerate(distinct.values())}

  def rest(needed: Sequence[Any], *arguments: Any) -> tuple[Any, ...]:
    values = dict(constants) | dict(zip(kept, needed, strict=False))
    values |= {one: needed[place] for one, place in zip(computed, places, strict=True)}
    values |= zip(asked, arguments, strict=True)
    _evaluate(later, values)
    return tuple(one.val if isinstance(one, Literal) else values[one] for one in jaxpr.outvars)

  return rest, needed
