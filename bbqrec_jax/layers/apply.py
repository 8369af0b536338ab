"""Calls a method of a Flax module with given parameters, as a pure function."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bbqrec_jax.layers.padding import without_padding


def apply(model: nn.Module, params: Any, method: str, *args: Any, rngs: Any = None, **kwargs: Any) -> Any:
  """`model.apply` for modules whose only collection is their parameters; returns what the method returns.

  Where the model's settings name a `dtype`, the parameters are taken in it, and so is all that follows from them; the
  gradients come back in the parameters' own. Where rows of parameters or arguments are filled up (`PaddedRows`), the
  model sees the arrays without, and the gradients have the filled form again.
  """
  params, args = without_padding((params, args))
  dtype = getattr(getattr(model, "settings", None), "dtype", "float32")
  if dtype != "float32":
    params = jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, params)
  return model.apply({"params": params}, *args, method=method, rngs=rngs, **kwargs)
