"""Collision repair against a search over all IDs in order of preference."""

import itertools

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from bbqrec_jax.errors import InputError
from bbqrec_jax.semantic_ids.repair import collision_rate, reassign_collisions, suffix_collisions


def quantize(latents, codebooks):
  residual, codes = latents.astype(np.float64), []
  for codebook in codebooks:
    codes.append(np.square(residual[:, None] - codebook).sum(axis=-1).argmin(axis=1))
    residual = residual - codebook[codes[-1]]
  return np.stack(codes, axis=1)


def catalogue(seed, *, items, levels, codes, spread=1.0):
  """Latents in a narrow cloud, so that many collide, their codes, and the codebooks."""
  rng = np.random.default_rng(seed)
  codebooks = rng.normal(size=(levels, codes, 3)) * 2.0 ** -np.arange(levels)[:, None, None]
  latents = spread * rng.normal(size=(items, 3))
  return quantize(latents, codebooks), latents, codebooks


def preference(latent, codebooks):
  """All IDs, the most wanted first: nearest code of level 1, under it the nearest of level 2, and so on."""

  def walk(residual, prefix):
    level = len(prefix)
    if level == len(codebooks):
      yield prefix
      return
    for code in np.argsort(np.square(codebooks[level] - residual).sum(axis=-1), kind="stable").tolist():
      yield from walk(residual - codebooks[level][code], (*prefix, code))

  return walk(latent, ())


def brute_force(codes, latents, codebooks):
  """The nearest item of each ID keeps it; the others, nearest first, take the free ID that they want most."""
  quantized = sum(codebooks[level][codes[:, level]] for level in range(len(codebooks)))
  order = sorted(range(len(codes)), key=lambda item: (np.square(latents[item] - quantized[item]).sum(), item))
  result = {}
  for item in order:
    if tuple(codes[item]) not in result.values():
      result[item] = tuple(codes[item])
  for item in order:
    if item not in result:
      taken = set(result.values())
      result[item] = next(wanted for wanted in preference(latents[item], codebooks) if wanted not in taken)
  return np.array([result[item] for item in range(len(codes))])


SHAPES = {
  "few collisions": {"items": 12, "levels": 3, "codes": 3},
  "prefixes overflow": {"items": 22, "levels": 2, "codes": 5, "spread": 0.3},
  "two levels overflow": {"items": 24, "levels": 3, "codes": 3, "spread": 0.1},
  "every ID is needed": {"items": 27, "levels": 3, "codes": 3},
  "one level": {"items": 6, "levels": 1, "codes": 8, "spread": 0.2},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_repair_equals_a_search_over_all_ids(shape, seed):
  codes, latents, codebooks = catalogue(seed, **shape)
  repaired = reassign_collisions(codes, latents, codebooks)
  assert len(np.unique(codes, axis=0)) < len(codes), "nothing collides: the example tries nothing"
  assert len(np.unique(repaired, axis=0)) == len(repaired)
  assert repaired.dtype == np.int32
  assert_array_equal(repaired, brute_force(codes, latents, codebooks))


def test_items_whose_id_is_theirs_alone_never_change_and_each_shared_id_keeps_one_holder():
  codes, latents, codebooks = catalogue(0, items=40, levels=3, codes=4, spread=0.7)
  repaired = reassign_collisions(codes, latents, codebooks)
  _, group, sizes = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
  group = group.reshape(-1)
  assert 0 < (sizes == 1).sum() < len(sizes)
  same = (repaired == codes).all(axis=1)
  assert same[sizes[group] == 1].all()
  assert_array_equal(np.bincount(group, weights=same), np.ones(len(sizes)))


def test_the_item_nearest_to_its_codewords_keeps_the_id():
  codebooks = np.array([[[0.0], [10.0]], [[0.0], [1.0]]])
  latents = np.array([[0.4], [0.1], [-0.2]])
  repaired = reassign_collisions(np.zeros((3, 2), int), latents, codebooks)
  assert_array_equal(repaired, [[1, 0], [0, 0], [0, 1]])


def test_a_collision_takes_the_nearest_free_last_level_code_under_its_prefix():
  codebooks = [np.array([[0.0], [100.0], [200.0], [300.0]]), np.array([[0.0], [3.0], [-2.0], [1.0]])]
  latents = np.array([[0.0], [0.1], [0.2]])
  repaired = reassign_collisions(np.zeros((3, 2), int), latents, np.stack(codebooks))
  assert_array_equal(repaired, [[0, 0], [0, 3], [0, 2]])


def test_a_full_prefix_carries_to_the_next_nearest_code_of_the_level_above():
  codebooks = np.array([[[0.0], [10.0]], [[0.0], [1.0]]])
  repaired = reassign_collisions(np.zeros((4, 2), int), np.array([[0.0], [0.1], [0.2], [0.3]]), codebooks)
  assert_array_equal(repaired, [[0, 0], [0, 1], [1, 0], [1, 1]])


def test_a_catalogue_as_large_as_the_ids_takes_every_one_and_one_more_item_is_refused():
  codebooks = np.random.default_rng(1).normal(size=(3, 2, 2))
  latents = np.zeros((9, 2))
  repaired = reassign_collisions(np.zeros((8, 3), int), latents[:8], codebooks)
  assert {tuple(row) for row in repaired.tolist()} == set(itertools.product(range(2), repeat=3))
  with pytest.raises(InputError, match=r"9 items.*3 levels of 2 codes make 8.*num_levels"):
    reassign_collisions(np.zeros((9, 3), int), latents, codebooks)


def test_equal_latents_are_told_apart_by_number_and_repair_is_deterministic():
  codes, latents, codebooks = catalogue(2, items=20, levels=3, codes=3, spread=0.0)
  first = reassign_collisions(codes, latents, codebooks)
  assert_array_equal(first[0], codes[0])
  assert_array_equal(first, reassign_collisions(codes.copy(), latents.copy(), codebooks.copy()))
  assert_array_equal(first, [tuple(x) for x in itertools.islice(preference(latents[0], codebooks), 20)])


def test_distinct_ids_come_back_unchanged_and_the_input_is_left_alone():
  codes, latents, codebooks = catalogue(3, items=30, levels=3, codes=4, spread=0.5)
  before = codes.copy()
  repaired = reassign_collisions(codes, latents, codebooks)
  assert_array_equal(codes, before)
  assert_array_equal(reassign_collisions(repaired, latents, codebooks), repaired)


def test_collision_rate_is_the_share_of_items_that_are_not_the_first_holder():
  assert collision_rate(np.array([[0, 1], [0, 1], [0, 1], [1, 1]])) == 0.5
  assert collision_rate(np.array([[0, 1], [1, 0]])) == 0


@pytest.mark.parametrize("seed", range(3))
def test_new_items_take_nothing_that_is_taken_and_else_what_they_would_take(seed):
  codes, latents, codebooks = catalogue(seed, items=20, levels=3, codes=3, spread=0.4)
  taken = np.array(list(itertools.product(range(3), repeat=3)))[seed::5]
  repaired = reassign_collisions(codes, latents, codebooks, taken=taken)
  together = np.concatenate([taken, repaired])
  assert len(np.unique(together, axis=0)) == len(together)
  # Against the search over all IDs: known items hold theirs whatever their error is.
  quantized = sum(codebooks[level][codes[:, level]] for level in range(3))
  order = sorted(range(20), key=lambda item: (np.square(latents[item] - quantized[item]).sum(), item))
  held, result = {tuple(row) for row in taken.tolist()}, {}
  for item in order:
    if tuple(codes[item]) not in held:
      result[item] = tuple(codes[item].tolist())
      held.add(result[item])
  for item in order:
    if item not in result:
      result[item] = next(wanted for wanted in preference(latents[item], codebooks) if wanted not in held)
      held.add(result[item])
  assert_array_equal(repaired, [result[item] for item in range(20)])


def test_taken_ids_count_against_the_capacity():
  codebooks = np.random.default_rng(1).normal(size=(1, 4, 2))
  with pytest.raises(InputError, match=r"5 items.*1 levels of 4 codes make 4"):
    reassign_collisions(np.zeros((3, 1), int), np.zeros((3, 2)), codebooks, taken=np.array([[0], [1]]))


def test_suffixes_count_the_items_of_one_id_in_order():
  codes = np.array([[1, 2], [0, 0], [1, 2], [1, 2], [0, 1], [0, 0]])
  expected = [[1, 2, 0], [0, 0, 0], [1, 2, 1], [1, 2, 2], [0, 1, 0], [0, 0, 1]]
  repaired = suffix_collisions(codes, num_codes=3)
  assert_array_equal(repaired, expected)
  assert repaired.dtype == np.int32
  taken = np.array([[0, 0, 0], [0, 0, 1], [2, 2, 0]])
  after = suffix_collisions(np.array([[0, 0], [2, 2], [1, 1]]), num_codes=3, taken=taken)
  assert_array_equal(after, [[0, 0, 2], [2, 2, 1], [1, 1, 0]])


def test_more_items_of_one_id_than_a_suffix_can_count_are_refused():
  with pytest.raises(InputError, match=r"4 items share the ID \[5, 6\].*tell 3 apart; .*tokenizer\.repair=reassign"):
    suffix_collisions(np.array([[5, 6]] * 4), num_codes=3)
