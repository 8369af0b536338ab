"""Functions by name: those of this project, and anybody's own."""

import importlib
from collections.abc import Mapping
from typing import Any


def named(name: str, known: Mapping[str, str]) -> Any:
  """What a config names: one of `known`, which says where it is as "module:function", or such a place itself.

  Raises:
    ValueError: if there is no such module or function.
  """
  module, _, function = known.get(name, name).partition(":")
  try:
    return getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError, ValueError) as error:
    expected = f"one of {', '.join(known)}, or module:function" if known else "module:function"
    raise ValueError(f"expected {expected}, got {name!r} ({error})") from error
