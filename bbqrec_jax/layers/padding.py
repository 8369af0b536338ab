"""Arrays padded to a multiple of rows, so that any number of devices can share them evenly."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class PaddedRows:
  """An array of `count` rows with rows of zeros after them; an optimiser takes it as it is, and leaves those at zero.

  Attributes:
    values: [count or more, ...].
    count: rows without the padding.
  """

  values: Any
  count: int = flax.struct.field(pytree_node=False)


def pad_rows(array: jax.Array, multiple: int) -> PaddedRows:
  """Fills an array [count, ...] up to a multiple of rows."""
  missing = -array.shape[0] % multiple
  return PaddedRows(jnp.pad(array, ((0, missing), *((0, 0) for _ in array.shape[1:]))), array.shape[0])


def is_padded(node: Any) -> bool:
  """Whether a node of a pytree is a `PaddedRows`, for `is_leaf`."""
  return isinstance(node, PaddedRows)


def without_padding(tree: Any) -> Any:
  """The tree with each `PaddedRows` as the array [count, ...] that it stands for."""
  return jax.tree.map(lambda node: node.values[: node.count] if is_padded(node) else node, tree, is_leaf=is_padded)
