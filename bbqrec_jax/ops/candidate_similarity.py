"""Similarity of candidates to the last items of a history, discretised and read off tables: numbers to add to scores.

    score[i] += sum over streams s and places r < R of table[s, r, bucket(similarity_s(i, h_r))]

h_r is the r-th last distinct item of the history. Similarities are cosines of the items' vectors of a stream, or how
often items occur near each other, as lists of neighbours. Nothing of size N x N is ever there.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# What a cosine may differ by from one program to the next, see `ops.similarity`.
_ROUNDING = 1e-5
_SAMPLES = 400_000
_ROWS_OF_AXES = 2**14
# Similarities of all places are computed together for so few histories, and so many per history: one product of
# matrices then costs a third of one per place. For more histories it costs as much, empty places included.
_FEW, _AT_ONCE = 16, 2**17


def tail_edges(vectors: np.ndarray, num_buckets: int, *, seed: int) -> np.ndarray:
  """Edges [num_buckets - 1] float32 of the cosines of random pairs; the more similar, the finer.

  The shares of pairs above them fall in equal ratios from 1/2 to that of four neighbours an item.

  Args:
    vectors: [N, d]; zero rows are items without any.
    num_buckets: 2 or more.
    seed: of the draw of pairs.
  """
  unit = unit_rows(vectors)
  there = np.flatnonzero(np.any(unit != 0, axis=1))
  if len(there) < 2:
    return np.zeros(num_buckets - 1, np.float32)
  rng = np.random.default_rng(seed)
  first = rng.integers(0, len(there), _SAMPLES)
  second = (first + rng.integers(1, len(there), _SAMPLES)) % len(there)
  cosines = np.einsum("nd,nd->n", unit[there[first]], unit[there[second]])
  above = 0.5 * (min(8.0 / len(there), 0.5)) ** (np.arange(num_buckets - 1) / max(num_buckets - 2, 1))
  edges = np.quantile(cosines.astype(np.float64), 1.0 - above)
  return np.minimum(edges, 1.0 - _ROUNDING).astype(np.float32) - np.float32(_ROUNDING)


def principal_axes(rows: np.ndarray, count: int) -> np.ndarray:
  """Orthonormal axes [d, count] along which rows [n, d] reach furthest, the furthest first, by subspace iteration.

  Of many rows 16,384 stand for all. With fewer dimensions than `count` there are as many axes.
  """
  rng = np.random.default_rng(0)
  if len(rows) > _ROWS_OF_AXES:
    rows = rows[rng.choice(len(rows), _ROWS_OF_AXES, replace=False)]
  rows = rows.astype(np.float32)
  axes = rng.normal(size=(rows.shape[1], min(count + 8, rows.shape[1]))).astype(np.float32)
  for _ in range(4):
    axes, _ = np.linalg.qr(rows.T @ (rows @ axes))
  _, turned = np.linalg.eigh(axes.T @ rows.T @ (rows @ axes))
  return axes @ turned[:, ::-1][:, :count]


def unit_rows(vectors: np.ndarray) -> np.ndarray:
  """Rows [N, d] of length 1, float32; zero rows stay."""
  norm = np.linalg.norm(vectors.astype(np.float32), axis=1, keepdims=True)
  return np.divide(vectors, norm, out=np.zeros(vectors.shape, np.float32), where=norm > 0)


def table_values(cosines: jax.Array, here: jax.Array, same: jax.Array, edges: jax.Array, row: jax.Array) -> jax.Array:
  """What a table's row says of similarities: a sum of steps, without a gather, which a CPU and a TPU are slow at.

  Args:
    cosines: of any shape.
    here: bool, whether both items have a vector.
    same: bool, whether they are one item.
    edges: [n - 1] ascending.
    row: [n + 2]: the buckets' numbers, that of an item and itself, that of a missing vector.
  """
  value = row[0] + sum(
    (jnp.where(cosines > edges[step], row[step + 1] - row[step], 0.0) for step in range(edges.shape[0])),
    start=jnp.zeros((), row.dtype),
  )
  return jnp.where(same, row[-2], jnp.where(here, value, row[-1]))


def vector_scores(
  unit: jax.Array, edges: jax.Array, table: jax.Array, recent: jax.Array, items: jax.Array | None = None
) -> jax.Array:
  """The sum over places of one stream of vectors.

  Args:
    unit: [N, d] float32 rows of length 1, or zero.
    edges: [n - 1].
    table: [R, n + 2] float32, see `table_values`.
    recent: [B, R] int, the last distinct items, the latest first; -1 fills.
    items: [B, n] int candidates, or None for all.

  Returns:
    [B, N] or [B, n] float32.
  """
  unit, edges, table, recent = map(jnp.asarray, (unit, edges, table, recent))
  there = jnp.any(unit != 0, axis=1)
  numbers = jnp.arange(unit.shape[0], dtype=recent.dtype)[None] if items is None else jnp.asarray(items)
  candidates = None if items is None else unit[numbers]
  shape = (recent.shape[0], numbers.shape[1])

  def cosines(own: jax.Array) -> jax.Array:
    """[..., B] -> [..., B, n]."""
    query = unit[jnp.maximum(own, 0)]
    if candidates is None:
      return jnp.einsum("...d,nd->...n", query, unit, preferred_element_type=jnp.float32)
    return jnp.einsum("...bd,bnd->...bn", query, candidates, preferred_element_type=jnp.float32)

  many = isinstance(shape[0], int) and shape[0] > _FEW  # In an exported program it may be a symbol.
  at_once = (cosines(recent.T),) if not many and table.shape[0] * shape[1] <= _AT_ONCE else ()

  def place(total: jax.Array, given: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
    own, row, *known = given
    here = there[jnp.maximum(own, 0)][:, None] & (there[None] if items is None else there[numbers])
    value = table_values(known[0] if known else cosines(own), here, numbers == own[:, None], edges, row)
    return total + jnp.where(own[:, None] >= 0, value, 0.0), None

  return _over_places(place, shape, recent, table, *at_once)


def neighbour_scores(
  neighbours: jax.Array, buckets: jax.Array, table: jax.Array, recent: jax.Array, items: jax.Array | None = None
) -> jax.Array:
  """The sum over places of a stream that is given as lists of neighbours; all other items add nothing.

  Args:
    neighbours: [N, K] int, -1 fills.
    buckets: [N, K] int in 0..n - 1.
    table: [R, n] float32.
    recent: as for `vector_scores`.
    items: likewise.

  Returns:
    [B, N] or [B, n] float32.
  """
  buckets, table = jnp.asarray(buckets), jnp.asarray(table)
  return _listed_scores(neighbours, lambda own, row: row[buckets[own]], table, recent, items)


def strength_scores(
  neighbours: jax.Array, strengths: jax.Array, weights: jax.Array, recent: jax.Array, items: jax.Array | None = None
) -> jax.Array:
  """The same of strengths [N, K] float32, each times the weight [R] of the place."""
  strengths, weights = jnp.asarray(strengths), jnp.asarray(weights)
  return _listed_scores(neighbours, lambda own, weight: weight * strengths[own], weights, recent, items)


def _listed_scores(
  neighbours: jax.Array,
  values: Callable[[jax.Array, jax.Array], jax.Array],
  table: jax.Array,
  recent: jax.Array,
  items: jax.Array | None,
) -> jax.Array:
  """See `neighbour_scores`: `values` gives for items [B] and a place's part of the table what each neighbour adds."""
  neighbours, recent = jnp.asarray(neighbours), jnp.asarray(recent)
  count = neighbours.shape[0]
  shape = (recent.shape[0], count if items is None else items.shape[1])
  rows = jnp.arange(recent.shape[0], dtype=jnp.int32)[:, None]

  def place(total: jax.Array, given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    own, row = given
    real = own[:, None] >= 0
    near = jnp.where(real, neighbours[jnp.maximum(own, 0)], -1)
    value = values(jnp.maximum(own, 0), row)
    if items is None:
      return total.at[rows, jnp.where(near < 0, count, near)].add(value, mode="drop"), None
    found = (items[:, :, None] == near[:, None, :]) & (near >= 0)[:, None, :]
    return total + jnp.sum(jnp.where(found, value[:, None, :], 0.0), axis=-1), None

  return _over_places(place, shape, recent, table)


def _over_places(
  place: Callable, shape: tuple[int, int], recent: jax.Array, table: jax.Array, *known: jax.Array
) -> jax.Array:
  """Adds up what each place gives; one at a time, and again for the gradient, so that one alone is ever there.

  A place that no history of the batch has costs nothing.
  """

  def unless_empty(total: jax.Array, given: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
    return jax.lax.cond(jnp.any(given[0] >= 0), place, lambda total, _: (total, None), total, given)

  total, _ = jax.lax.scan(jax.checkpoint(unless_empty), jnp.zeros(shape, jnp.float32), (recent.T, table, *known))
  return total


def latest_first(items: jax.Array, real: jax.Array) -> jax.Array:
  """The distinct items of each history, the latest first.

  Args:
    items: [B, T] int, in time order.
    real: [B, T] bool, False at padding.

  Returns:
    [B, T] int; -1 fills the end.
  """
  turned = jnp.where(real, items, -1)[:, ::-1]
  order = jnp.argsort(turned, axis=1, stable=True)  # Of equal items the latest comes first.
  ranked = jnp.take_along_axis(turned, order, axis=1)
  again = jnp.concatenate([jnp.zeros_like(ranked[:, :1], bool), ranked[:, 1:] == ranked[:, :-1]], axis=1)
  once = jnp.take_along_axis(jnp.where(again, -1, ranked), jnp.argsort(order, axis=1), axis=1)
  return jnp.take_along_axis(once, jnp.argsort(once < 0, axis=1, stable=True), axis=1)
