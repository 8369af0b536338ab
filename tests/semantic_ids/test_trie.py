"""The trie against the sets of prefixes it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.errors import InputError
from bbqrec_jax.semantic_ids.trie import Trie, build_trie

children, emptied_children, share_of = (
  jax.jit(method, static_argnames="level") for method in (Trie.children, Trie.emptied, Trie.share)
)


def distinct_codes(seed=0, *, items=40, levels=3, codes=5):
  rng = np.random.default_rng(seed)
  chosen = rng.choice(codes**levels, size=items, replace=False)
  return np.stack(np.unravel_index(chosen, (codes,) * levels), axis=1)


def prefixes_by_walking(trie):
  """For each level, the prefix of each node, found through `children` alone."""
  levels, known = [], [()]
  for level in range(trie.num_levels):
    nodes, codes, valid = (np.asarray(x) for x in children(trie, level, jnp.arange(len(known))))
    following = {}
    for parent, prefix in enumerate(known):
      for node, code in zip(nodes[parent][valid[parent]], codes[parent][valid[parent]], strict=True):
        assert node not in following, "a node has two parents"
        following[int(node)] = (*prefix, int(code))
    known = [following[node] for node in range(len(following))]
    levels.append(known)
  return levels


SHAPES = [(1, 3, 5), (5, 1, 5), (40, 3, 5), (27, 3, 3)]


@pytest.mark.parametrize(("items", "levels", "codes"), SHAPES)
def test_nodes_of_each_level_are_the_prefixes_of_the_items_ids_each_once(items, levels, codes):
  ids = distinct_codes(items=items, levels=levels, codes=codes)
  walked = prefixes_by_walking(build_trie(ids))
  for level, prefixes in enumerate(walked):
    assert len(set(prefixes)) == len(prefixes)
    assert set(prefixes) == {tuple(row[: level + 1]) for row in ids.tolist()}


@pytest.mark.parametrize(("items", "levels", "codes"), SHAPES)
def test_every_leaf_is_one_item_and_every_item_one_leaf(items, levels, codes):
  ids = distinct_codes(items=items, levels=levels, codes=codes)
  trie = build_trie(ids)
  leaves = prefixes_by_walking(trie)[-1]
  assert_array_equal(np.sort(trie.items), np.arange(items))
  assert_array_equal(np.array(leaves), ids[np.asarray(trie.items)])


def test_children_are_ascending_ranges_of_the_next_level_as_wide_as_the_widest_parent():
  ids = distinct_codes()
  trie = build_trie(ids)
  for level in range(trie.num_levels):
    counts = {}
    for row in {tuple(row[: level + 1]) for row in ids.tolist()}:
      counts[row[:-1]] = counts.get(row[:-1], 0) + 1
    assert trie.fanouts[level] == max(counts.values())
    assert_array_equal(np.diff(trie.starts[level]), [counts[parent] for parent in sorted(counts)])
    nodes, codes, valid = map(np.asarray, children(trie, level, jnp.arange(len(counts))))
    assert nodes.shape[1] == trie.fanouts[level]
    for parent in range(len(counts)):
      assert (np.diff(codes[parent][valid[parent]]) > 0).all()
    assert nodes[~valid].max(initial=0) == 0


def test_paths_are_the_nodes_that_each_items_id_goes_through():
  ids = distinct_codes()
  trie = build_trie(ids)
  assert trie.paths.shape == ids.shape
  assert trie.paths.dtype == jnp.int32
  items = jnp.arange(len(ids))
  for level, walked in enumerate(prefixes_by_walking(trie)):
    assert [walked[node] for node in trie.paths[:, level]] == [tuple(row) for row in ids[:, : level + 1].tolist()]
    above = trie.paths[:, level - 1] if level else np.zeros(len(ids))
    assert_array_equal(trie.parents(level, items), above)
  assert_array_equal(trie.items[trie.paths[:, -1]], items)


@pytest.mark.parametrize(("items", "levels", "codes"), SHAPES)
def test_leaves_count_the_items_under_each_node(items, levels, codes):
  ids = distinct_codes(items=items, levels=levels, codes=codes)
  trie = build_trie(ids)
  for level, prefixes in enumerate(prefixes_by_walking(trie)):
    expected = [(ids[:, : level + 1] == prefix).all(axis=1).sum() for prefix in prefixes]
    assert_array_equal(trie.leaves[level], expected)


def test_a_node_is_emptied_once_every_item_under_it_is_taken_away():
  ids = distinct_codes()
  trie = build_trie(ids)
  excluded = np.random.default_rng(1).integers(-1, len(ids), (2, 60))  # Repeats and fillers among them.
  for level, prefixes in enumerate(prefixes_by_walking(trie)):
    # All nodes above, in an order of each row's own.
    parents = np.stack([np.random.default_rng(seed).permutation(len(trie.starts[level]) - 1) for seed in (2, 3)])
    nodes, _, valid = map(np.asarray, children(trie, level, jnp.asarray(parents)))
    emptied = np.asarray(emptied_children(trie, level, jnp.asarray(parents), jnp.asarray(excluded)))
    assert emptied.shape == nodes.shape
    for row in range(2):
      left = np.delete(ids, excluded[row][excluded[row] >= 0], axis=0)
      alive = {tuple(prefix) for prefix in left[:, : level + 1].tolist()}
      assert sorted(nodes[row][valid[row]]) == list(range(len(prefixes)))
      expected = [prefixes[node] not in alive for node in nodes[row][valid[row]]]
      assert_array_equal(emptied[row][valid[row]], expected)
    # A few of the parents, and one of them again as what fills a beam: the first of equal ones is answered for.
    few = np.asarray(emptied_children(trie, level, jnp.asarray(parents[:, [0, -1, 0]]), jnp.asarray(excluded)))
    assert_array_equal(few[:, 0] & valid[:, 0], emptied[:, 0] & valid[:, 0])
    if level:
      assert_array_equal(few[:, 1] & valid[:, -1], emptied[:, -1] & valid[:, -1])
    if level + 1 == trie.num_levels:
      assert emptied.any()
      assert not emptied.all()


def test_the_share_of_the_items_under_a_node_is_counted():
  ids = distinct_codes()
  trie = build_trie(ids)
  draw = np.random.default_rng(4)
  items = np.stack([np.append(draw.choice(len(ids), 9, replace=False), [-1, -1]) for _ in range(2)])
  for level, prefixes in enumerate(prefixes_by_walking(trie)):
    nodes = np.random.default_rng(5).integers(len(prefixes), size=(2, 3, 7))
    share = np.asarray(share_of(trie, level, jnp.asarray(nodes), jnp.asarray(items)))
    for row in range(2):
      some = np.array(prefixes)[nodes[row]]
      under = np.all(ids[None, :, None, : level + 1] == some[:, None], axis=-1)  # [3, N, 7]
      assert_allclose(share[row], under[:, items[row][:-2]].sum(axis=1) / under.sum(axis=1), rtol=1e-6)


def test_children_keep_the_shape_of_the_parents():
  trie = build_trie(distinct_codes())
  parents = jnp.array([[0, 3, 1], [2, 2, 0]])
  nodes, codes, valid = children(trie, 1, parents)
  for part in (nodes, codes, valid):
    assert part.shape == (2, 3, trie.fanouts[1])
  alone = children(trie, 1, jnp.array([2]))
  for part, expected in zip((nodes, codes, valid), alone, strict=True):
    assert_array_equal(part[1, 0], expected[0])
    assert_array_equal(part[1, 1], expected[0])


def test_the_order_of_the_items_does_not_change_the_ids_of_the_trie():
  ids = distinct_codes()
  order = np.random.default_rng(1).permutation(len(ids))
  trie, shuffled = build_trie(ids), build_trie(ids[order])
  for level in range(trie.num_levels):
    assert_array_equal(trie.codes[level], shuffled.codes[level])
    assert_array_equal(trie.starts[level], shuffled.starts[level])
  assert_array_equal(order[np.asarray(shuffled.items)], trie.items)


@pytest.mark.parametrize(("first", "second"), [(3, 17), (0, 1), (38, 39)])
def test_two_items_of_one_id_are_refused_and_both_named(first, second):
  ids = distinct_codes()
  ids[second] = ids[first]
  with pytest.raises(InputError) as error:
    build_trie(ids)
  assert f"items {first} and {second} share the semantic ID {tuple(ids[first].tolist())}" in str(error.value)


def test_a_negative_code_is_refused_and_the_item_named():
  ids = distinct_codes()
  ids[7, 1] = -1
  with pytest.raises(InputError, match="item 7"):
    build_trie(ids)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (4,)])
def test_no_items_or_no_levels_are_refused_with_the_shape(shape):
  with pytest.raises(InputError) as error:
    build_trie(np.zeros(shape, int))
  assert str(shape) in str(error.value)
