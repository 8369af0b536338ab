"""Runs training steps and maps over devices; the only file that knows pmap and meshes.

A step is a pure function `step(state, shared, batch, *, axis_name)` that returns (state, metrics). It reduces its
gradients and metrics over `axis_name` with `reduce_shares`, so that what leaves it is the same on every device; where
`axis_name` is None the batch it sees is the global one.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bbqrec_jax.errors import InputError
from bbqrec_jax.layers.padding import PaddedRows, is_padded, pad_rows
from bbqrec_jax.utils.environment import start_devices

_AXIS = "batch"

StepFunction = Callable[..., tuple[Any, Any]]
MapFunction = Callable[[Any, Any, Any], Any]


def reduce_shares(tree: Any, axis_name: str | None) -> Any:
  """Sums each device's share of a value, or of its gradient (see `ops.reduction.masked_mean`)."""
  return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def made_on_host() -> contextlib.AbstractContextManager[Any]:
  """Makes arrays in the host's memory, to be placed later: they may be larger than a device.

  Where `JAX_PLATFORMS` excludes the CPU, they are made on the first device.
  """
  try:
    return jax.default_device(jax.local_devices(backend="cpu")[0])
  except RuntimeError:
    return contextlib.nullcontext()


def _jit_once(function: Callable[[], Any], **options: Any) -> Callable[[], Any]:
  """Jits a function that will run once, with a lower optimisation level on a CPU.

  There the initialisation of a state takes longer to compile than to run a thousand times; the level changes no bit.
  """
  told = jax.config.values["jax_disable_most_optimizations"]
  quick = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" and not told else None
  return jax.jit(function, compiler_options=quick, **options)


class Partitioner(Protocol):
  """Places a state on the devices and spreads batches over them, within one process or several."""

  num_devices: int
  fills_rows: bool  # Whether large arrays are padded to a multiple of the number of devices.

  def place(self, tree: Any) -> Any:
    """Copies a state, or data shared by all devices, to the devices; every process gives the same."""
    ...

  def create(self, function: Callable[[], Any]) -> Any:
    """The result of a function without arguments, placed; it need never be whole on one device."""
    ...

  def fetch(self, tree: Any) -> Any:
    """The placed tree as whole NumPy arrays, in every process."""
    ...

  def to_checkpoint(self, state: Any) -> Any:
    """A view of a placed state as checkpoints store it."""
    ...

  def from_checkpoint(self, saved: Any, like: Any) -> Any:
    """The inverse of `to_checkpoint`; `like` is a placed state, or one of shapes alone."""
    ...

  def compile_step(self, step: StepFunction) -> StepFunction:
    """(state, shared, batch) -> (state, metrics); the state given is donated.

    Each process gives its own rows of the batch; the metrics are those of the global one.
    """
    ...

  def compile_map(self, function: MapFunction) -> MapFunction:
    """(params, shared, batch) -> a pytree of [B, ...] arrays, one row an example, for any number of rows.

    Every process gives the whole batch and gets the whole result, each device working on its rows.
    """
    ...


class SingleDevice:
  """One device, plain jit."""

  num_devices = 1
  fills_rows = False

  def place(self, tree: Any) -> Any:
    """Puts the tree on the first local device."""
    return jax.device_put(tree, jax.local_devices()[0], may_alias=False)

  def create(self, function: Callable[[], Any]) -> Any:
    """Jits the function."""
    return self.place(_jit_once(function)())

  def fetch(self, tree: Any) -> Any:
    """Copies to the host."""
    return jax.device_get(tree)

  def to_checkpoint(self, state: Any) -> Any:
    """The state."""
    return state

  def from_checkpoint(self, saved: Any, like: Any) -> Any:
    """The state."""
    del like
    return saved

  def compile_step(self, step: StepFunction) -> StepFunction:
    """Jits the step."""
    return jax.jit(lambda state, shared, batch: step(state, shared, batch, axis_name=None), donate_argnums=0)

  def compile_map(self, function: MapFunction) -> MapFunction:
    """Jits the function."""
    return jax.jit(function)


class Pmap:
  """All devices, each with its rows of the batch and a replica of the state.

  The state is not stacked: it goes in and comes out in its natural shapes, so checkpoints know nothing of devices.
  """

  fills_rows = False

  def __init__(self, *, devices: Sequence[jax.Device] | None = None):
    """Over all devices of all processes, or over some of the only process."""
    self._devices = list(_all_devices() if devices is None else devices)
    self._local = [device for device in self._devices if device.process_index == jax.process_index()]
    self.num_devices = len(self._devices)
    self._mesh = Mesh(np.array(self._devices), (_AXIS,))
    self._replicated = NamedSharding(Mesh(np.array(self._local), (_AXIS,)), PartitionSpec())

  def place(self, tree: Any) -> Any:
    """Puts a copy on every local device; a tree left on one device could not be donated."""
    return jax.device_put(tree, self._replicated, may_alias=False)

  def create(self, function: Callable[[], Any]) -> Any:
    """Makes it on every local device."""
    return _jit_once(function, out_shardings=self._replicated)()

  def fetch(self, tree: Any) -> Any:
    """Copies one replica to the host."""
    return jax.device_get(tree)

  def to_checkpoint(self, state: Any) -> Any:
    """The replicas of all processes as global arrays; of a single process one replica."""
    if jax.process_count() == 1:
      return jax.tree.map(_replica, state)
    return multihost_utils.host_local_array_to_global_array(state, self._mesh, PartitionSpec())

  def from_checkpoint(self, saved: Any, like: Any) -> Any:
    """This process's replicas of global arrays."""
    del like
    if jax.process_count() == 1:
      return self.place(saved)
    return multihost_utils.global_array_to_host_local_array(saved, self._mesh, PartitionSpec())

  def _mapped(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return jax.pmap(
      function,
      axis_name=_AXIS,
      in_axes=(None, None, 0),
      out_axes=None,
      devices=self._devices,
      **options,
    )

  def compile_step(self, step: StepFunction) -> StepFunction:
    """Pmaps the step over the rows of the batch."""
    mapped = self._mapped(lambda state, shared, batch: step(state, shared, batch, axis_name=_AXIS), donate_argnums=0)

    def run(state: Any, shared: Any, batch: Any) -> tuple[Any, Any]:
      _check_rows(batch, len(self._local))
      return mapped(state, shared, jax.tree.map(lambda leaf: _blocks(leaf, len(self._local)), batch))

    return run

  def compile_map(self, function: MapFunction) -> MapFunction:
    """Pmaps the function, and gathers its rows on every device."""
    mapped = self._mapped(
      lambda params, shared, batch: jax.lax.all_gather(function(params, shared, batch), _AXIS, tiled=True)
    )
    mine = np.array([device in self._local for device in self._devices])

    def run(params: Any, shared: Any, batch: Any) -> Any:
      rows, batch = _filled(batch, self.num_devices)
      shares = jax.tree.map(lambda leaf: _blocks(leaf, self.num_devices)[mine], batch)
      return _first(mapped(params, shared, shares), rows)

    return run


class MeshJit:
  """All devices as one: a jitted step of the global batch, whose rows are spread over a mesh of the devices.

  XLA divides the work and adds what has to be added up. Large tables need not fit a device: arrays of many rows, and
  what the optimiser keeps of them, are spread by their rows, as `PaddedRows`.
  """

  def __init__(self, *, shard_rows: int = 0, devices: Sequence[jax.Device] | None = None):
    """Over all devices of all processes, or over those given.

    Args:
      shard_rows: arrays of a state or of shared data with at least so many rows are spread; 0: each device has all.
      devices: of the mesh; they may be those of a topology that is only compiled for.
    """
    devices = list(_all_devices() if devices is None else devices)
    self.shard_rows, self.fills_rows = shard_rows, shard_rows > 0
    self.num_devices = len(devices)
    mesh = Mesh(np.array(devices), (_AXIS,))
    self._rows = NamedSharding(mesh, PartitionSpec(_AXIS))
    self._replicated = NamedSharding(mesh, PartitionSpec())

  def _sharding(self, node: Any) -> Any:
    return PaddedRows(self._rows, node.count) if is_padded(node) else self._replicated

  def _shardings(self, tree: Any) -> Any:
    return jax.tree.map(self._sharding, tree, is_leaf=is_padded)

  def _padded(self, tree: Any) -> Any:
    """The tree with arrays of many rows as `PaddedRows`; to be traced."""

    def one(leaf):
      many = self.shard_rows and jnp.ndim(leaf) and leaf.shape[0] >= self.shard_rows
      return pad_rows(leaf, self.num_devices) if many else leaf

    return jax.tree.map(one, tree)

  def abstract(self, tree: Any) -> Any:
    """What `place` gives, as shapes alone; those of `tree` are enough for it."""
    padded = jax.eval_shape(self._padded, tree)
    return jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      padded,
      self._shardings(padded),
    )

  def abstract_batch(self, batch: Any) -> Any:
    """What a global batch becomes, as shapes alone."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._rows), batch)

  def place(self, tree: Any) -> Any:
    """Gives each device its rows of large arrays, and a copy of all others."""

    def put(leaf, like):
      if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(leaf), like), impl=jax.random.key_impl(leaf))
      array, many = np.asarray(leaf), is_padded(like)
      shape = like.values.shape if many else array.shape
      sharding = self._rows if many else self._replicated
      placed = jax.make_array_from_callback(shape, sharding, lambda index: _block(array, index, shape))
      return PaddedRows(placed, like.count) if many else placed

    return jax.tree.map(put, tree, self.abstract(tree))

  def create(self, function: Callable[[], Any]) -> Any:
    """Makes each device's part on that device."""

    def padded():
      return self._padded(function())

    return _jit_once(padded, out_shardings=self._shardings(jax.eval_shape(padded)))()

  def fetch(self, tree: Any) -> Any:
    """Gathers the rows of large arrays, and copies to the host."""

    def whole(node):
      if not is_padded(node):
        return np.asarray(node)
      return np.asarray(multihost_utils.process_allgather(node.values, tiled=True))[: node.count]

    return jax.tree.map(whole, tree, is_leaf=is_padded)

  def to_checkpoint(self, state: Any) -> Any:
    """Large arrays with their filling: another number of devices fills up to another number of rows."""
    whole = _replica if jax.process_count() == 1 else lambda leaf: leaf
    return jax.tree.map(lambda node: node.values if is_padded(node) else whole(node), state, is_leaf=is_padded)

  def from_checkpoint(self, saved: Any, like: Any) -> Any:
    """The arrays with what is known of their filling."""

    def one(node: Any, leaf: Any) -> Any:
      return PaddedRows(leaf, node.count) if is_padded(node) else jax.device_put(leaf, self._replicated)

    return jax.tree.map(one, like, saved, is_leaf=is_padded)

  def jit_step(self, step: StepFunction) -> Any:
    """The jitted step of placed arrays, for `compile_step` and for those who want it compiled alone."""

    def run(state, shared, batch):
      results = step(state, shared, batch, axis_name=None)
      return jax.lax.with_sharding_constraint(results, self._shardings(results))

    return jax.jit(run, donate_argnums=0)

  def compile_step(self, step: StepFunction) -> StepFunction:
    """Jits the step of the global batch."""
    compiled = self.jit_step(step)
    local = self.num_devices // jax.process_count()

    def run(state: Any, shared: Any, batch: Any) -> tuple[Any, Any]:
      _check_rows(batch, local)
      spread = jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(self._rows, leaf), batch)
      return compiled(state, shared, spread)

    return run

  def compile_map(self, function: MapFunction) -> MapFunction:
    """Jits the function of the whole batch, and gathers its rows on every device."""
    compiled = jax.jit(function, out_shardings=self._replicated)

    def run(params: Any, shared: Any, batch: Any) -> Any:
      rows, batch = _filled(batch, self.num_devices)
      spread = jax.tree.map(
        lambda leaf: jax.make_array_from_callback(leaf.shape, self._rows, lambda index: leaf[index]), batch
      )
      return _first(compiled(params, shared, spread), rows)

    return run


def _all_devices() -> list[jax.Device]:
  """The devices of all processes, each process's side by side, as its rows of a batch are."""
  return [device for index in range(jax.process_count()) for device in jax.local_devices(process_index=index)]


def _check_rows(batch: Any, devices: int) -> None:
  """Refuses a batch that does not divide."""
  for leaf in jax.tree.leaves(batch):
    if leaf.shape[0] % devices:
      raise InputError(f"a batch of {leaf.shape[0]} rows cannot be spread over {devices} devices: use a multiple")


def _replica(leaf: jax.Array) -> jax.Array:
  """A replicated array on its first device alone.

  Of one on several, orbax would write a part from each, and compile a program to cut out every part of every array.
  """
  return leaf.addressable_data(0)


def _blocks(leaf: Any, count: int) -> Any:
  """[B, ...] -> [count, B / count, ...]."""
  return leaf.reshape(count, leaf.shape[0] // count, *leaf.shape[1:])


def _filled(batch: Any, multiple: int) -> tuple[int, Any]:
  """The batch's rows, and the batch as NumPy arrays with its last row repeated up to a multiple of rows."""
  rows = len(jax.tree.leaves(batch)[0])
  if rows % multiple == 0:
    return rows, jax.tree.map(np.asarray, batch)
  index = np.minimum(np.arange(rows + -rows % multiple), rows - 1)
  return rows, jax.tree.map(lambda leaf: np.asarray(leaf)[index], batch)


def _first(results: Any, rows: int) -> Any:
  """The results without what came of repeated rows."""
  return jax.tree.map(lambda leaf: leaf if len(leaf) == rows else leaf[:rows], results)


def _block(array: np.ndarray, index: Any, shape: tuple[int, ...]) -> np.ndarray:
  """A copy of one device's rows of an array that is filled up with zeros to a shape."""
  if not shape:
    return array.copy()
  first, last, _ = index[0].indices(shape[0])
  rows = array[first:last]
  return np.pad(rows, ((0, last - first - len(rows)), *((0, 0) for _ in shape[1:])))


PARTITIONERS: dict[str, Callable[[], Partitioner]] = {"mesh": MeshJit, "pmap": Pmap, "single": SingleDevice}


def make_partitioner(config: Any) -> Partitioner:
  """The partitioner of a run's config.

  Raises:
    InputError: if JAX cannot start, see `start_devices`.
  """
  start_devices()
  return MeshJit(shard_rows=config.shard_rows) if config.partitioner == "mesh" else PARTITIONERS[config.partitioner]()
