"""Classes and functions that a config names: those of this project, and custom ones."""

import importlib
from collections.abc import Mapping
from typing import Any

from bbqrec_jax.errors import InputError


def named(name: str, known: Mapping[str, str]) -> Any:
  """What a config names: one of `known`, whose values are "module:function", or a "module:function" itself.

  Raises:
    ValueError: if there is no such module or function.
  """
  module, _, function = known.get(name, name).partition(":")
  try:
    return getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError, ValueError) as error:
    expected = f"one of {', '.join(known)}, or module:function" if known else "module:function"
    raise ValueError(f"expected {expected}, got {name!r} ({error})") from error


def part(field: str, name: str, known: Mapping[str, str], *, base: type | None = None) -> Any:
  """What the config field `field` names, see `named`.

  Args:
    field: for messages.
    name: the field's value.
    known: parts of this project.
    base: the class that it must be a subclass of; None asks for a function.

  Raises:
    InputError: if it is not there, or is something else.
  """
  try:
    found = named(name, known)
  except ValueError as error:
    raise InputError(f"config field {field}: {error}") from error
  fits = callable(found) if base is None else isinstance(found, type) and issubclass(found, base)
  if not fits:
    expected = "a function" if base is None else f"a subclass of {base.__module__}.{base.__name__}"
    raise InputError(f"config field {field} = {name!r}: expected {expected}, got {found!r}")
  return found
