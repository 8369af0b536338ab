"""Names of a package that are imported when they are asked for, so that importing the package costs nothing."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
  package: str, names: Mapping[str, Sequence[str]]
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
  """What a package's `__init__` has as `__all__`, `__getattr__` and `__dir__` (PEP 562).

  Args:
    package: its own `__name__`.
    names: what it offers, by the module within it that has them.
  """
  modules = {name: module for module, own in names.items() for name in own}

  def get(name: str) -> Any:
    if name not in modules:
      raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)

  def show() -> list[str]:
    return [*vars(sys.modules[package]), *modules]

  return sorted(modules), get, show
