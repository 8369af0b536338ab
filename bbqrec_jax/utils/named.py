"""Functions by name: those of this project, and anybody's own."""

import importlib
from collections.abc import Callable
from typing import Any


def named(name: str, known: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
  """What a config names: one of `known`, or the function of "module:function".

  Raises:
    ValueError: if there is no such module or function.
  """
  if name in known:
    return known[name]
  module, _, function = name.partition(":")
  try:
    return getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError, ValueError) as error:
    expected = f"one of {', '.join(known)}, or module:function" if known else "module:function"
    raise ValueError(f"expected {expected}, got {name!r} ({error})") from error
