"""Calls one method of a module with given parameters, as a pure function."""

from typing import Any

import flax.linen as nn


def apply(model: nn.Module, params: Any, method: str, *args: Any, rngs: Any = None, **kwargs: Any) -> Any:
  """`model.apply` for modules whose only collection is their parameters; returns what the method returns."""
  return model.apply({"params": params}, *args, method=method, rngs=rngs, **kwargs)
