"""How a step meets the devices. The only file that knows pmap.

A step is a pure function `step(state, shared, batch, *, axis_name)` that returns (state, metrics). It reduces its
gradients and metrics over `axis_name` with `reduce_shares`, so that what leaves it is the same on every device.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bbqrec_jax.errors import InputError

_AXIS = "batch"

StepFunction = Callable[..., tuple[Any, Any]]


def reduce_shares(tree: Any, axis_name: str | None) -> Any:
  """Sums each device's share of a value, or of its gradient (see `ops.reduction.masked_mean`)."""
  return tree if axis_name is None else jax.lax.psum(tree, axis_name)


class Partitioner(Protocol):
  """Where the state lives and how a batch is spread."""

  num_devices: int

  def replicate(self, tree: Any) -> Any:
    """Copies a state, or data shared by all devices, to where the steps will find it."""
    ...

  def compile_step(self, step: StepFunction) -> StepFunction:
    """(state, shared, batch) -> (state, metrics); the state given is donated."""
    ...

  def compile_map(self, function: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """(params, shared, batch) -> a pytree of [B, ...] arrays, one row an example."""
    ...


class SingleDevice:
  """One device, plain jit."""

  num_devices = 1

  def replicate(self, tree: Any) -> Any:
    """Puts the tree on the first local device."""
    return jax.device_put(tree, jax.local_devices()[0], may_alias=False)

  def compile_step(self, step: StepFunction) -> StepFunction:
    """Jits the step."""
    return jax.jit(lambda state, shared, batch: step(state, shared, batch, axis_name=None), donate_argnums=0)

  def compile_map(self, function: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """Jits the function."""
    return jax.jit(function)


class Pmap:
  """All devices, each with its rows of the batch and a replica of the state.

  The state is not stacked: it goes in and comes out in its natural shapes, so checkpoints know nothing of devices.
  """

  def __init__(self):
    self.devices = jax.local_devices()
    self.num_devices = jax.device_count()
    self._replicated = NamedSharding(Mesh(np.array(self.devices), (_AXIS,)), PartitionSpec())

  def replicate(self, tree: Any) -> Any:
    """Puts a copy on every local device; a tree left on one device could not be donated."""
    return jax.device_put(tree, self._replicated, may_alias=False)

  def _split(self, batch: Any) -> Any:
    count = len(self.devices)

    def one(leaf):
      if leaf.shape[0] % count:
        raise InputError(f"a batch of {leaf.shape[0]} rows cannot be spread over {count} devices: use a multiple")
      return leaf.reshape(count, leaf.shape[0] // count, *leaf.shape[1:])

    return jax.tree.map(one, batch)

  def compile_step(self, step: StepFunction) -> StepFunction:
    """Pmaps the step over the rows of the batch."""
    mapped = jax.pmap(
      lambda state, shared, batch: step(state, shared, batch, axis_name=_AXIS),
      axis_name=_AXIS,
      in_axes=(None, None, 0),
      out_axes=None,
      donate_argnums=0,
      devices=None if jax.process_count() > 1 else self.devices,
    )
    return lambda state, shared, batch: mapped(state, shared, self._split(batch))

  def compile_map(self, function: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """Pmaps the function and joins its rows again."""
    mapped = jax.pmap(
      function,
      in_axes=(None, None, 0),
      devices=None if jax.process_count() > 1 else self.devices,
    )

    def joined(params, shared, batch):
      rows = mapped(params, shared, self._split(batch))
      return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), rows)

    return joined


PARTITIONERS: dict[str, Callable[[], Partitioner]] = {"pmap": Pmap, "single": SingleDevice}
