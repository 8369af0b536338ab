"""Beam search over tables of log-probabilities that depend on the whole prefix, against brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.semantic_ids.beam import beam_search, item_log_probs
from bbqrec_jax.semantic_ids.trie import build_trie

BATCH, ITEMS, LEVELS, CODES = 3, 20, 3, 4


@pytest.fixture(scope="module")
def ids():
  chosen = np.random.default_rng(0).choice(CODES**LEVELS, size=ITEMS, replace=False)
  return np.stack(np.unravel_index(chosen, (CODES,) * LEVELS), axis=1)


@pytest.fixture(scope="module")
def tables():
  """For each level, log-probabilities [B, K ** level, K]: a distribution of its own for every prefix."""
  rng = np.random.default_rng(1)
  logits = [2 * rng.normal(size=(BATCH, CODES**level, CODES)) for level in range(LEVELS)]
  return [(x - np.log(np.exp(x).sum(axis=-1, keepdims=True))).astype(np.float32) for x in logits]


def prefix_number(codes):
  number = 0
  for code in codes:
    number = number * CODES + int(code)
  return number


def exact(ids, tables):
  """Log-probability of every item's ID, [B, N] float64."""
  result = np.zeros((BATCH, len(ids)))
  for b, item, level in np.ndindex(BATCH, len(ids), LEVELS):
    result[b, item] += tables[level][b, prefix_number(ids[item, :level]), ids[item, level]]
  return result


def narrow(ids, table_row, width):
  """Plain beam search over existing prefixes for one row: items, best first."""
  beams = [((), 0.0)]
  for level in range(LEVELS):
    grown = [
      ((*prefix, code), score + float(table_row[level][prefix_number(prefix), code]))
      for prefix, score in beams
      for code in range(CODES)
      if (ids[:, : level + 1] == (*prefix, code)).all(axis=1).any()
    ]
    beams = sorted(grown, key=lambda beam: -beam[1])[:width]
  return [int(np.flatnonzero((ids == prefix).all(axis=1))[0]) for prefix, _ in beams]


def decoder(tables):
  """The step and first state of a decoder that reads the tables."""

  def step(state, level, codes):
    # The state is the number of each beam's prefix: a beam reordered without its state would read another's row.
    if codes is not None:
      state = {"prefix": state["prefix"] * CODES + codes, "trail": state["trail"].at[..., level - 1].set(codes)}
    from_trail = sum(state["trail"][..., i] * CODES ** (level - 1 - i) for i in range(level)) if level else 0
    log_probs = jnp.take_along_axis(tables[level], state["prefix"][..., None], axis=1)
    # Two leaves of different rank must stay together.
    return jnp.where((state["prefix"] == from_trail)[..., None], log_probs, jnp.nan), state

  return step, {"prefix": jnp.zeros((BATCH, 1), jnp.int32), "trail": jnp.zeros((BATCH, 1, LEVELS), jnp.int32)}


@functools.partial(jax.jit, static_argnames="width")
def search(trie, tables, width, exclude=None):
  return beam_search(trie, *decoder(tables), batch=BATCH, width=width, exclude=exclude)


@pytest.fixture(scope="module")
def trie(ids):
  return build_trie(ids)


@pytest.mark.parametrize("width", [ITEMS, ITEMS + 7])
def test_a_beam_as_wide_as_the_catalogue_is_the_exact_ranking(ids, tables, trie, width):
  result = search(trie, tables, width)
  expected = exact(ids, tables)
  order = np.argsort(-expected, axis=1)
  assert_array_equal(result.items[:, :ITEMS], order)
  assert_allclose(result.log_probs[:, :ITEMS], np.take_along_axis(expected, order, axis=1), atol=1e-5)
  assert_array_equal(result.items[:, ITEMS:], np.full((BATCH, width - ITEMS), -1))
  assert np.isneginf(result.log_probs[:, ITEMS:]).all()


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_narrow_beam_equals_plain_beam_search_and_its_log_probs_are_exact(ids, tables, trie, width):
  result = search(trie, tables, width)
  assert result.items.shape == (BATCH, width)
  expected = exact(ids, tables)
  for b in range(BATCH):
    found = np.asarray(result.items[b])
    assert len(set(found.tolist())) == width, "an item came back twice"
    assert ((found >= 0) & (found < ITEMS)).all()
    assert_array_equal(found, narrow(ids, [table[b] for table in tables], width))
    assert_allclose(result.log_probs[b], expected[b, found], atol=1e-5)


@pytest.mark.parametrize("count", [1, 6])
def test_given_items_have_their_exact_log_probs_in_the_order_they_are_given_in(ids, tables, trie, count):
  items = np.random.default_rng(4).integers(ITEMS, size=(BATCH, count))
  found = jax.jit(lambda items: item_log_probs(trie, *decoder(tables), items))(items)
  assert_allclose(found, np.take_along_axis(exact(ids, tables), items, axis=1), atol=1e-5)


def test_given_items_have_their_shares_of_the_existing_ids_where_those_are_to_sum_to_one(ids, tables, trie):
  every = np.tile(np.arange(ITEMS), (BATCH, 1))

  @jax.jit
  def shares(items):
    return item_log_probs(
      trie, *decoder(tables), items, normalize=True, subtree_logits=lambda state, level, nodes: 0.1 * nodes
    )

  found = np.asarray(shares(every), np.float64)
  assert_allclose(np.exp(found).sum(axis=1), np.ones(BATCH), rtol=1e-5)
  nodes = np.asarray(trie.paths)
  for b, item in np.ndindex(BATCH, ITEMS):
    expected = 0.0
    for level in range(LEVELS):
      siblings = (ids[:, :level] == ids[item, :level]).all(axis=1)
      row = tables[level][b, prefix_number(ids[item, :level])].astype(np.float64)
      scores = {int(nodes[i, level]): row[ids[i, level]] + 0.1 * nodes[i, level] for i in np.flatnonzero(siblings)}
      expected += scores[int(nodes[item, level])] - np.log(np.exp(list(scores.values())).sum())
    assert found[b, item] == pytest.approx(expected, abs=1e-4)


def test_the_example_has_a_row_where_a_narrow_beam_misses_the_best_item(ids, tables):
  best = exact(ids, tables).argmax(axis=1)
  assert any(narrow(ids, [table[b] for table in tables], 1)[0] != best[b] for b in range(BATCH))


def test_excluded_items_never_come_back_and_the_others_keep_their_order(ids, tables, trie):
  expected = exact(ids, tables)
  order = np.argsort(-expected, axis=1)
  # The best and the fifth of each row, and a filler.
  exclude = np.stack([order[:, 0], np.full(BATCH, -1), order[:, 4]], axis=1)
  exclude[2] = -1
  result = search(trie, tables, ITEMS, jnp.asarray(exclude))
  for b in range(BATCH):
    left = [item for item in order[b] if item not in exclude[b]]
    assert_array_equal(result.items[b], left + [-1] * (ITEMS - len(left)))
    assert_allclose(result.log_probs[b, : len(left)], expected[b, left], atol=1e-5)
    assert np.isneginf(result.log_probs[b, len(left) :]).all()


def test_one_item_is_left_when_all_others_are_excluded_and_none_when_it_is_too(ids, tables, trie):
  expected = exact(ids, tables)
  exclude = np.stack([np.delete(np.arange(ITEMS), keep) for keep in (0, 7, 19)])
  result = search(trie, tables, ITEMS, jnp.asarray(exclude))
  assert_array_equal(result.items[:, 0], [0, 7, 19])
  assert_allclose(result.log_probs[:, 0], expected[np.arange(3), [0, 7, 19]], atol=1e-5)
  assert_array_equal(result.items[:, 1:], np.full((BATCH, ITEMS - 1), -1))
  everything = np.tile(np.arange(ITEMS), (BATCH, 1))
  assert_array_equal(search(trie, tables, ITEMS, jnp.asarray(everything)).items, np.full((BATCH, ITEMS), -1))


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_narrow_beam_with_exclusions_is_plain_beam_search_over_what_is_left(ids, tables, trie, width):
  # Most items go, whole branches among them, some are named twice: the beam stays as full as there are items.
  gone = np.random.default_rng(2).permuted(np.tile(np.arange(ITEMS), (BATCH, 1)), axis=1)[:, : ITEMS - 4]
  result = search(
    trie, tables, width, jnp.asarray(np.concatenate([gone, gone[:, :3], np.full((BATCH, 2), -1)], axis=1))
  )
  expected = exact(ids, tables)
  for b in range(BATCH):
    left = np.setdiff1d(np.arange(ITEMS), gone[b])
    assert len(np.unique(ids[left, 0])) < len(np.unique(ids[:, 0])), "no branch is gone"
    found = left[narrow(ids[left], [table[b] for table in tables], width)]
    assert_array_equal(result.items[b, : len(found)], found)
    assert_allclose(result.log_probs[b, : len(found)], expected[b, found], atol=1e-5)
    assert len(found) == min(width, 4)
    assert_array_equal(result.items[b, len(found) :], np.full(width - len(found), -1))


def test_a_catalogue_of_two_items_fills_the_rest_of_the_beam_with_minus_one(ids, tables):
  few = ids[[4, 9]]
  result = search(build_trie(few), tables, 6)
  expected = exact(few, tables)
  order = np.argsort(-expected, axis=1)
  assert_array_equal(result.items, np.pad(order, ((0, 0), (0, 4)), constant_values=-1))
  assert_allclose(result.log_probs[:, :2], np.take_along_axis(expected, order, axis=1), atol=1e-5)
  assert np.isneginf(result.log_probs[:, 2:]).all()


def test_a_beam_as_wide_as_a_catalogue_of_five_thousand_is_exact():
  """Codes whose probability depends on the code before: the score of every item is a sum of table entries."""
  count, levels, num_codes, rng = 5000, 3, 32, np.random.default_rng(3)
  chosen = rng.choice(num_codes**levels, size=count, replace=False)
  codes = np.stack(np.unravel_index(chosen, (num_codes,) * levels), axis=1)
  logits = rng.normal(size=(levels, 2, num_codes, num_codes)).astype(np.float32)
  scores = logits[0][:, 0, codes[:, 0]]
  for level in range(1, levels):
    scores = scores + logits[level][:, codes[:, level - 1], codes[:, level]]

  @functools.partial(jax.jit, static_argnames="width")
  def found(trie, *, width):
    def step(state, level, last):
      before = jnp.zeros((2, 1), jnp.int32) if last is None else last
      return jnp.take_along_axis(jnp.asarray(logits[level]), before[..., None], axis=1), state

    return beam_search(trie, step, {}, batch=2, width=width)

  trie, order = build_trie(codes), np.argsort(-scores, axis=1)
  result = found(trie, width=count)
  assert_array_equal(np.sort(result.items, axis=1), np.tile(np.arange(count), (2, 1)))
  assert_allclose(result.log_probs, np.take_along_axis(scores, order, axis=1), atol=1e-5)
  assert_allclose(np.take_along_axis(scores, np.asarray(result.items), axis=1), result.log_probs, atol=1e-5)
  few = found(trie, width=20)
  assert_allclose(np.take_along_axis(scores, np.asarray(few.items), axis=1), few.log_probs, atol=1e-5)
