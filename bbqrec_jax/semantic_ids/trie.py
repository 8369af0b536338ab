"""The trie of all items' semantic IDs as flat arrays, so that a jitted search can walk it.

Items are sorted by ID, so the children of a node are one range of the next level's nodes, and the nodes of the last
level are the items. Memory is one code and one offset per node: no dense [nodes, K] table.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from bbqrec_jax.errors import InputError
from bbqrec_jax.ops.ranking import each_once


@flax.struct.dataclass
class Trie:
  """A trie of L levels over N items.

  Attributes:
    codes: for each level, [n] int32, the code of each of the level's n nodes; ascending among siblings.
    starts: for each level, [parents + 1] int32: the children of parent p are nodes starts[p]..starts[p + 1] - 1. The
      first level has one parent, the root.
    items: [N] int32, the item at each node of the last level.
    paths: [N, L] int32, for each item the node of each level that its ID goes through.
    leaves: for each level, [n] int32, how many items stand under each node; all 1 at the last.
    fanouts: for each level, the most children that any parent has.
  """

  codes: tuple[jax.Array, ...]
  starts: tuple[jax.Array, ...]
  items: jax.Array
  paths: jax.Array
  leaves: tuple[jax.Array, ...]
  fanouts: tuple[int, ...] = flax.struct.field(pytree_node=False)

  @property
  def num_levels(self) -> int:
    """L."""
    return len(self.codes)

  def children(self, level: int, parents: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The children of nodes: parents [...] -> (nodes, codes, valid), each [..., fan-out of the level]."""
    first, last = self.starts[level][parents], self.starts[level][parents + 1]
    offset = jax.lax.broadcasted_iota(jnp.int32, (*parents.shape, self.fanouts[level]), parents.ndim)
    nodes = first[..., None] + offset
    valid = nodes < last[..., None]
    nodes = jnp.where(valid, nodes, 0)
    return nodes, self.codes[level][nodes], valid

  def parents(self, level: int, items: jax.Array) -> jax.Array:
    """The node above `level` that each item's ID goes through: items [...] -> [...] int32; of the first level, 0."""
    return self.paths[items, level - 1] if level else jnp.zeros(items.shape, jnp.int32)

  def pooled(self, log_weights: jax.Array, vectors: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
    """Log of the total weight of the items under each node, and the weighted mean of their vectors.

    Args:
      log_weights: [N] float32.
      vectors: [N, d].

    Returns:
      For each level [n] float32 and [n, d] float32; at the last level those of the items themselves.
    """
    sorted_weights, sorted_vectors = log_weights[self.items], vectors[self.items].astype(jnp.float32)
    largest = jax.lax.stop_gradient(jnp.max(log_weights))
    weights = jnp.exp(sorted_weights - largest)
    masses, means = [], []
    for level in range(self.num_levels - 1):
      nodes, count = self.paths[self.items, level], self.codes[level].shape[0]
      total = jax.ops.segment_sum(weights, nodes, count, indices_are_sorted=True)
      sums = jax.ops.segment_sum(weights[:, None] * sorted_vectors, nodes, count, indices_are_sorted=True)
      masses.append(jnp.log(total) + largest)
      means.append(sums / total[:, None])
    return [*masses, sorted_weights], [*means, sorted_vectors]

  def share(self, level: int, nodes: jax.Array, items: jax.Array) -> jax.Array:
    """Of the items under each node, the share that is among given ones.

    Args:
      level: of the nodes.
      nodes: [B, ..., n] int.
      items: [B, E] int, each once; -1 fills.

    Returns:
      [B, ..., n] float32.
    """
    through = jnp.where(items < 0, -1, self.paths[jnp.maximum(items, 0), level])
    same = nodes[..., None] == jnp.expand_dims(through, tuple(range(1, nodes.ndim)))
    return jnp.sum(same, axis=-1, dtype=jnp.float32) / self.leaves[level][nodes].astype(jnp.float32)

  def emptied(self, level: int, parents: jax.Array, excluded: jax.Array) -> jax.Array:
    """Whether nothing is left under a child once items are taken away.

    Args:
      level: of the children.
      parents: [B, w] int, nodes above; of equal ones in a row the first alone is answered for.
      excluded: [B, E] int, items; -1 fills, and an item may be there twice.

    Returns:
      [B, w, fan-out of the level] bool, for children as `children` gives them.
    """
    excluded = each_once(excluded)
    items = jnp.maximum(excluded, 0)
    above = self.parents(level, items)
    # Each excluded item is under one parent at most, and counts at its own place among that parent's children.
    under = (parents[:, :, None] == above[:, None, :]) & (excluded >= 0)[:, None, :]
    parent = jnp.where(jnp.any(under, axis=1), jnp.argmax(under, axis=1).astype(jnp.int32), parents.shape[1])
    child = self.paths[items, level] - self.starts[level][above]
    nodes, _, _ = self.children(level, parents)
    rows = jnp.arange(parents.shape[0], dtype=jnp.int32)[:, None]
    taken = jnp.zeros(nodes.shape, jnp.int32).at[rows, parent, child].add(1, mode="drop")
    return taken >= self.leaves[level][nodes]


def build_trie(codes: np.ndarray) -> Trie:
  """Builds the trie of the semantic IDs `codes` [N, L].

  Raises:
    InputError: if there is no item, a code is negative, or two items share an ID.
  """
  if codes.ndim != 2 or 0 in codes.shape:
    raise InputError(f"semantic IDs must be [items, levels] and not empty, got shape {codes.shape}")
  if codes.min() < 0:
    raise InputError(f"semantic IDs must not be negative, item {int(np.argmax(codes.min(1) < 0))} has one that is")
  codes = codes.astype(np.int32)
  order = np.lexsort(codes.T[::-1])
  ordered = codes[order]
  # changed[r, l]: row r differs from row r - 1 somewhere in its first l + 1 codes, so it opens a node of level l.
  changed = np.ones(ordered.shape, bool)
  changed[1:] = np.logical_or.accumulate(ordered[1:] != ordered[:-1], axis=1)
  if not changed[:, -1].all():
    row = int(np.argmin(changed[:, -1]))
    raise InputError(
      f"items {order[row - 1]} and {order[row]} share the semantic ID {tuple(ordered[row].tolist())}: repair collisions"
      " before building a trie"
    )
  level_codes, starts, fanouts, leaves = [], [], [], []
  parent_rows = np.zeros(1, np.int64)
  for level in range(codes.shape[1]):
    rows = np.flatnonzero(changed[:, level])
    start = np.append(np.searchsorted(rows, parent_rows), len(rows)).astype(np.int32)
    level_codes.append(jnp.asarray(ordered[rows, level]))
    starts.append(jnp.asarray(start))
    fanouts.append(int(np.diff(start).max()))
    leaves.append(jnp.asarray(np.diff(rows, append=len(codes)), jnp.int32))
    parent_rows = rows
  paths = np.empty(codes.shape, np.int32)
  for level in range(codes.shape[1]):
    paths[order, level] = np.cumsum(changed[:, level], dtype=np.int32) - 1
  return Trie(
    codes=tuple(level_codes),
    starts=tuple(starts),
    items=jnp.asarray(order, jnp.int32),
    paths=jnp.asarray(paths),
    leaves=tuple(leaves),
    fanouts=tuple(fanouts),
  )
