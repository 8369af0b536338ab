"""AdamW with its learning-rate schedule, weight-decay mask and gradient clipping, in few operations."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bbqrec_jax.layers.padding import PaddedRows, is_padded, pad_rows, without_padding

_SMALL = 2**16  # Numbers of a parameter up to which it is updated together with others.


def learning_rate(settings: Any, step: jax.Array | int, total_steps: jax.Array | int) -> jax.Array:
  """Linear warm-up, then cosine decay to a hundredth.

  Args:
    settings: has `learning_rate` and `warmup_steps`.
    step: how many were taken before.
    total_steps: of the whole run.
  """
  warmup = jnp.minimum(settings.warmup_steps, total_steps)
  rise = step / jnp.maximum(warmup, 1)
  progress = jnp.clip((step - warmup) / jnp.maximum(total_steps - warmup, 1), 0.0, 1.0)
  fall = 0.01 + 0.99 * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
  return jnp.float32(settings.learning_rate) * jnp.where(step < warmup, rise, fall).astype(jnp.float32)


class ScheduleState(NamedTuple):
  """Where a schedule stands. Its length is state, so that runs of all lengths are one program.

  Attributes:
    step: int32, updates made.
    total_steps: int32.
  """

  step: jax.Array
  total_steps: jax.Array


def _scale_by_schedule(settings: Any, total_steps: int) -> optax.GradientTransformation:
  def init(params: Any) -> ScheduleState:
    del params
    return ScheduleState(jnp.zeros((), jnp.int32), jnp.full((), total_steps, jnp.int32))

  def update(updates: Any, state: ScheduleState, params: Any = None) -> tuple[Any, ScheduleState]:
    del params
    rate = learning_rate(settings, *state)
    return jax.tree.map(lambda leaf: -rate * leaf, updates), state._replace(step=state.step + 1)

  return optax.GradientTransformation(init, update)


def _decays(path: Any) -> bool:
  # Any place of the path: the rows of a matrix may be in a structure of their own (`PaddedRows`).
  return jax.tree_util.DictKey("kernel") in path


def together(tree: Any) -> Any:
  """A tree of parameters, or of their gradients, whose small arrays are side by side in one array of a kind.

  What an optimiser does to every array is then compiled, and started, for a few. The kinds are those that decay and
  those that do not.

  Returns:
    {"kernel" or "other": {"small": [1, n], path: [...]}}; the one row is not what devices share out.
  """
  found: dict[str, dict[str, Any]] = {}
  small: dict[str, list[jax.Array]] = {}
  for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_padded):
    kind = "kernel" if _decays(path) else "other"
    if math.prod(_shape(node)) <= _SMALL:
      small.setdefault(kind, []).append(jnp.ravel(without_padding(node)))
    else:
      found.setdefault(kind, {})[jax.tree_util.keystr(path)] = node
  for kind, parts in small.items():
    found.setdefault(kind, {})["small"] = jnp.concatenate(parts)[None]
  return found


def apart(gathered: Any, like: Any) -> Any:
  """The inverse of `together`; `like` has the structure and the shapes."""
  start = {"kernel": 0, "other": 0}

  def one(path: Any, node: Any) -> Any:
    kind, shape = "kernel" if _decays(path) else "other", _shape(node)
    size = math.prod(shape)
    if size > _SMALL:
      return gathered[kind][jax.tree_util.keystr(path)]
    first = start[kind]
    start[kind] += size
    array = gathered[kind]["small"][0, first : first + size].reshape(shape)
    return pad_rows(array, len(node.values)) if is_padded(node) else array

  return jax.tree_util.tree_map_with_path(one, like, is_leaf=is_padded)


def _shape(node: Any) -> tuple[int, ...]:
  return (node.count, *node.values.shape[1:]) if isinstance(node, PaddedRows) else jnp.shape(node)


def make_optimizer(settings: Any, *, total_steps: int) -> optax.GradientTransformation:
  """AdamW behind a global-norm clip; only the layers' matrices decay.

  That is, not biases, norms, tables of embeddings or of codes, nor what makes an item's vector of its features.

  Args:
    settings: as for `learning_rate`, and `b2`, `weight_decay`, `clip_norm`.
    total_steps: steps of the whole run, which are part of the first state alone.
  """
  inner = optax.chain(
    optax.clip_by_global_norm(settings.clip_norm),
    optax.scale_by_adam(b2=settings.b2),
    optax.add_decayed_weights(
      settings.weight_decay, mask=lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: _decays(path), tree)
    ),
    _scale_by_schedule(settings, total_steps),
  )

  def init(params: Any) -> Any:
    return inner.init(together(params))

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    moved, state = inner.update(together(updates), state, together(params))
    return apart(moved, updates), state

  return optax.GradientTransformation(init, update)
