"""The input pipeline against brute force: what each epoch holds, and that a resumed run is given the same batches."""

import dataclasses
import itertools
import json
from collections import Counter

import numpy as np
import pytest

from bbqrec_jax.data import packing, ranking
from bbqrec_jax.data.feature_store import FeatureStore
from bbqrec_jax.data.interactions import distinct_items, from_lengths
from bbqrec_jax.data.packing import cut_windows, pack
from bbqrec_jax.data.pipeline import (
  CatalogueSample,
  PackedHistories,
  PrefixHistories,
  recommender_batches,
  tokenizer_batches,
)
from bbqrec_jax.data.ranking import evaluation_batches, filled_rows, ranking_batches
from bbqrec_jax.errors import InputError

LENGTHS = (0, 1, 2, 3, 60, 5, 5, 8, 1, 21, 2, 4, 137, 6, 7)


def make_histories(lengths=LENGTHS, *, seed=0, num_items=None):
  """Histories in which every item occurs once, unless `num_items` says how few there are."""
  rng = np.random.default_rng(seed)
  total = sum(lengths)
  items = rng.permutation(total) + 1 if num_items is None else rng.integers(0, num_items, total)
  return from_lengths(items, np.array(lengths), np.array([f"u{user}" for user in range(len(lengths))]))


def packed_epoch(histories, **options):
  """All rows of a packed epoch at once."""
  rows = packing.packed_epoch(histories, **options)
  return rows.make(0, rows.num_rows)


def prefix_epoch(histories, **options):
  """All rows of an epoch of prefixes at once."""
  rows = packing.prefix_epoch(histories, **options)
  return rows.make(0, rows.num_rows)


def transitions(histories):
  """How often each (item, next item) follows within a history."""
  pairs = Counter()
  for user in range(histories.num_users):
    pairs.update(itertools.pairwise(histories.history(user).tolist()))
  return pairs


def windows_of(rows):
  """The windows of packed rows, each a dict of lists, after checking how they lie in their row."""
  windows = []
  for row in range(len(rows["segments"])):
    segments = rows["segments"][row]
    used = int(np.count_nonzero(segments))
    assert np.all(segments[used:] == 0), "padding stands at the end of a row"
    for name, grid in rows.items():
      assert np.all(grid[row, used:] == 0), f"padding of {name} is 0"
    if not used:
      continue
    # Segments are numbered 1, 2, ... in the order of their slots.
    assert segments[0] == 1
    assert set(np.diff(segments[:used]).tolist()) <= {0, 1}
    for number in range(1, segments.max() + 1):
      slots = np.flatnonzero(segments == number)
      np.testing.assert_array_equal(rows["positions"][row, slots], np.arange(len(slots)))
      windows.append({name: grid[row, slots].tolist() for name, grid in rows.items()})
  return windows


def learned_transitions(rows, *, whole):
  """How often each (input, target) occurs in packed rows."""
  pairs = Counter()
  for window in windows_of(rows):
    if whole:
      pairs.update(itertools.pairwise(window["items"]))
    else:
      # Within a window the target of one slot is the input of the next.
      assert window["targets"][:-1] == window["items"][1:]
      pairs.update(zip(window["items"], window["targets"], strict=True))
  return pairs


def stack(batches, names=("items", "targets", "segments", "positions")):
  """Batches one below another."""
  return {name: np.concatenate([batch[name] for batch in batches]) for name in names if name in batches[0]}


def assert_same_batches(left, right):
  assert len(left) == len(right)
  for one, other in zip(left, right, strict=True):
    assert_same_tree(one, other)


def assert_same_tree(one, other):
  if isinstance(one, dict):
    assert one.keys() == other.keys()
    for name in one:
      assert_same_tree(one[name], other[name])
  else:
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("max_transitions", [1, 2, 7, 19, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_cut_windows_covers_every_transition_once(max_transitions, seed):
  rng = np.random.default_rng(seed)
  lengths = np.concatenate([[0, 1, 2, 3, 4001], rng.integers(0, 50, 60), [max_transitions, max_transitions + 1, 0]])
  lengths = rng.permutation(lengths)
  users, spans = cut_windows(lengths, max_transitions, np.random.default_rng(seed))
  covered = Counter()
  for user, (start, stop) in zip(users.tolist(), spans.tolist(), strict=True):
    assert 0 <= start < stop <= start + max_transitions
    covered.update((user, transition) for transition in range(start, stop))
  assert covered == Counter((u, t) for u, length in enumerate(lengths.tolist()) for t in range(length - 1))


def test_cut_windows_keeps_a_history_that_fits_whole():
  users, spans = cut_windows(np.array([6, 2, 5]), 5, np.random.default_rng(0))
  np.testing.assert_array_equal(users, [0, 1, 2])
  np.testing.assert_array_equal(spans, [[0, 5], [0, 1], [0, 4]])


def test_cut_windows_moves_the_cuts_of_a_long_history():
  first_cuts = set()
  for seed in range(100):
    _, spans = cut_windows(np.array([24]), 5, np.random.default_rng(seed))
    first_cuts.add(int(spans[0, 1]))
    assert set(np.diff(spans[1:-1], axis=1).ravel().tolist()) == {5}, "only the outer windows are short"
  assert first_cuts == {1, 2, 3, 4, 5}


def test_cut_windows_of_nothing():
  users, spans = cut_windows(np.array([0, 1, 1]), 4, np.random.default_rng(0))
  assert users.shape == (0,)
  assert spans.shape == (0, 2)


@pytest.mark.parametrize("seed", range(6))
def test_pack_neither_overlaps_nor_overflows(seed):
  rng = np.random.default_rng(seed)
  row_length = int(rng.integers(1, 20))
  sizes = rng.integers(1, row_length + 1, int(rng.integers(1, 200)))
  rows, columns = pack(sizes, row_length)
  taken = Counter()
  for size, row, column in zip(sizes.tolist(), rows.tolist(), columns.tolist(), strict=True):
    assert column >= 0
    assert column + size <= row_length
    taken.update((row, slot) for slot in range(column, column + size))
  assert set(taken.values()) == {1}
  assert set(rows.tolist()) == set(range(rows[-1] + 1)), "no row is left empty"


def test_pack_is_next_fit():
  sizes = np.array([3, 3, 2, 5, 1, 6, 6, 1])
  expected, row, used = [], 0, 0
  for size in sizes.tolist():
    if used + size > 6:
      row, used = row + 1, 0
    expected.append((row, used))
    used += size
  rows, columns = pack(sizes, 6)
  assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == expected


def test_pack_of_nothing():
  rows, columns = pack(np.zeros(0, np.int64), 4)
  assert rows.shape == columns.shape == (0,)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("max_length", "row_length"), [(2, 2), (5, 5), (5, 13), (20, 32), (200, 256)])
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_holds_every_transition_once(whole, max_length, row_length, epoch):
  histories = make_histories()
  rows = packed_epoch(histories, max_length=max_length, row_length=row_length, whole=whole, seed=5, epoch=epoch)
  assert rows.keys() == {"items", "segments", "positions"} | (set() if whole else {"targets"})
  for grid in rows.values():
    assert grid.dtype == np.int32
    assert grid.shape == rows["items"].shape
  assert rows["items"].shape[1] == row_length
  assert learned_transitions(rows, whole=whole) == transitions(histories)
  assert max(len(window["items"]) for window in windows_of(rows)) <= max_length


@pytest.mark.parametrize("whole", [True, False])
def test_an_epoch_of_repeated_items_holds_every_transition_as_often_as_the_histories(whole):
  histories = make_histories(num_items=4)
  rows = packed_epoch(histories, max_length=6, row_length=16, whole=whole, seed=0, epoch=0)
  assert learned_transitions(rows, whole=whole) == transitions(histories)


def test_windows_are_slices_of_their_histories():
  histories = make_histories()
  for whole in (True, False):
    rows = packed_epoch(histories, max_length=6, row_length=16, whole=whole, seed=0, epoch=0)
    whole_histories = [histories.history(user).tolist() for user in range(histories.num_users)]
    for window in windows_of(rows):
      items = window["items"] if whole else [*window["items"], window["targets"][-1]]
      assert any(
        items == history[first : first + len(items)] for history in whole_histories for first in range(len(history))
      )


def test_an_epoch_is_shuffled():
  histories = make_histories([4] * 50)
  first = packed_epoch(histories, max_length=4, row_length=4, whole=True, seed=0, epoch=0)["items"]
  users = [int(np.flatnonzero(histories.items == row[0])[0]) // 4 for row in first]
  assert sorted(users) == list(range(50))
  assert users != list(range(50))


def packed(histories, *, whole=False, seed=0, batch_rows=4, **process):
  return PackedHistories(
    histories, batch_rows=batch_rows, max_length=6, row_length=16, whole=whole, seed=seed, **process
  )


def prefixes(histories, **options):
  return PrefixHistories(histories, max_length=6, seed=0, bounds=(2, 4), **options)


def rows_of_epoch(histories, *, whole, seed, epoch):
  return packed_epoch(histories, max_length=6, row_length=16, whole=whole, seed=seed, epoch=epoch)


@pytest.mark.parametrize("whole", [True, False])
def test_batches_walk_epoch_after_epoch_and_fill_up_the_last(whole):
  histories = make_histories()
  epochs = [rows_of_epoch(histories, whole=whole, seed=1, epoch=epoch) for epoch in range(3)]
  assert any(len(rows["items"]) % 4 for rows in epochs), "the case of a last batch that is not full must occur"
  iterator, index = iter(packed(histories, whole=whole, seed=1)), 0
  for rows in epochs:
    count = len(rows["items"])
    number = -(-count // 4)
    batches = [next(iterator) for _ in range(number)]
    assert [batch["index"] for batch in batches] == list(range(index, index + number))
    index += number
    for name, grid in rows.items():
      stacked = np.concatenate([batch[name] for batch in batches])
      assert stacked.dtype == np.int32
      np.testing.assert_array_equal(stacked[:count], grid)
      np.testing.assert_array_equal(stacked[count:], 0)
      assert len(stacked) == 4 * number


def test_batch_order_is_a_function_of_the_seed():
  histories = make_histories()
  first, again, other = (list(itertools.islice(packed(histories, seed=seed), 12)) for seed in (3, 3, 4))
  assert_same_batches(first, again)
  assert not np.array_equal(stack(first)["items"], stack(other)["items"])


def test_epochs_differ():
  histories = make_histories()
  first, second = (rows_of_epoch(histories, whole=False, seed=0, epoch=epoch) for epoch in (0, 1))
  assert windows_of(first) != windows_of(second)
  # Not only the order: long histories are cut elsewhere.
  assert {tuple(w["items"]) for w in windows_of(first)} != {tuple(w["items"]) for w in windows_of(second)}


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_each_global_batch(process_count):
  histories = make_histories()
  together = list(itertools.islice(packed(histories), 15))
  apart = [
    list(itertools.islice(packed(histories, process_index=index, process_count=process_count), 15))
    for index in range(process_count)
  ]
  for step, batch in enumerate(together):
    parts = [batches[step] for batches in apart]
    assert {part["index"] for part in parts} == {batch["index"]}
    for name in ("items", "targets", "segments", "positions"):
      assert {len(part[name]) for part in parts} == {4 // process_count}
      np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), batch[name])


@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("make", [packed, prefixes], ids=["packed", "prefixes"])
def test_empty_rows_fill_each_batch_where_devices_do_not_divide_it(make, process_count):
  histories = make_histories()
  together = list(itertools.islice(make(histories, batch_rows=5), 15))
  apart = [
    list(
      itertools.islice(make(histories, batch_rows=5, process_index=index, process_count=process_count, multiple=8), 15)
    )
    for index in range(process_count)
  ]
  for step, batch in enumerate(together):
    for name in batch.keys() - {"index"}:
      parts = [batches[step][name] for batches in apart]
      assert {len(part) for part in parts} == {8 // process_count}
      filled = np.concatenate(parts)
      np.testing.assert_array_equal(filled[:5], batch[name])
      assert not filled[5:].any()


def make_store(num_items):
  rng = np.random.default_rng(2)
  features = {"text": rng.normal(3.0, 2.0, (num_items, 5)), "image": rng.normal(size=(num_items, 3)).astype(np.float16)}
  present = {"text": np.ones(num_items, bool), "image": rng.random(num_items) < 0.7}
  features["image"][~present["image"]] = 0.0
  return FeatureStore(features, present)


def make_tokenizer_batches(histories, **process):
  num_items = int(histories.items.max()) + 1
  return tokenizer_batches(
    packed(histories, whole=True, **process), make_store(num_items), CatalogueSample(num_items, 8, 0), **process
  )


@pytest.mark.parametrize("make", [lambda histories: recommender_batches(packed(histories)), make_tokenizer_batches])
@pytest.mark.parametrize("taken", [0, 1, 9])
def test_a_restored_iterator_goes_on_with_the_next_batch(make, taken):
  histories = make_histories()
  iterator = iter(make(histories))
  for _ in range(taken):
    next(iterator)
  state = iterator.get_state()
  saved = json.dumps(state)
  # Far enough to cross the end of an epoch more than once.
  expected = [next(iterator) for _ in range(15)]
  assert json.dumps(state) == saved, "a state that was handed out must not change"
  fresh = iter(make(histories))
  fresh.set_state(json.loads(saved))
  assert_same_batches([next(fresh) for _ in range(15)], expected)
  # Back to the same place within one iterator.
  iterator.set_state(json.loads(saved))
  assert_same_batches([next(iterator) for _ in range(3)], expected[:3])
  iterator.close()
  fresh.close()


def test_recommender_batches_are_the_packed_ones_without_their_number():
  histories = make_histories()
  expected = list(itertools.islice(packed(histories), 14))
  iterator = iter(recommender_batches(packed(histories)))
  for batch in expected:
    del batch["index"]
    assert_same_tree(next(iterator), batch)
  iterator.close()


def test_tokenizer_batches_join_histories_with_features_and_a_catalogue_sample():
  histories = make_histories()
  num_items = int(histories.items.max()) + 1
  store, sample = make_store(num_items), CatalogueSample(num_items, 8, 0)
  iterator = iter(make_tokenizer_batches(histories))
  for rows in itertools.islice(packed(histories, whole=True), 6):
    batch = next(iterator)
    np.testing.assert_array_equal(batch["items"], sample(rows["index"]))
    for name, other in (("history_items", "items"), ("segments", "segments"), ("positions", "positions")):
      np.testing.assert_array_equal(batch[name], rows[other])
    for modality in ("text", "image"):
      every_feature, every_present = (part[modality] for part in store.rows(np.arange(num_items)))
      np.testing.assert_array_equal(batch["features"][modality], every_feature[batch["items"]])
      np.testing.assert_array_equal(batch["present"][modality], every_present[batch["items"]])
      np.testing.assert_array_equal(batch["history_features"][modality], every_feature[rows["items"]])
      np.testing.assert_array_equal(batch["history_present"][modality], every_present[rows["items"]])
  iterator.close()


def test_processes_share_each_tokenizer_batch():
  histories = make_histories()
  together = iter(make_tokenizer_batches(histories))
  apart = [iter(make_tokenizer_batches(histories, process_index=index, process_count=2)) for index in range(2)]
  for _ in range(5):
    batch, parts = next(together), [next(iterator) for iterator in apart]
    for name in ("items", "history_items", "segments", "positions"):
      np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), batch[name])
    for name in ("features", "present", "history_features", "history_present"):
      for modality, expected in batch[name].items():
        np.testing.assert_array_equal(np.concatenate([part[name][modality] for part in parts]), expected)
  for iterator in (together, *apart):
    iterator.close()


def test_packed_histories_refuse_what_they_cannot_serve():
  histories = make_histories()
  arguments = {"batch_rows": 4, "max_length": 6, "row_length": 16, "whole": False, "seed": 0}
  with pytest.raises(InputError, match="row_length 5 is less than max_length 6"):
    PackedHistories(histories, **(arguments | {"row_length": 5}))
  with pytest.raises(InputError, match="batch_rows 4 is not a multiple of the 3 processes"):
    PackedHistories(histories, **arguments, process_index=0, process_count=3)
  with pytest.raises(InputError, match="no training history has two items"):
    PackedHistories(make_histories([1, 0, 1]), **arguments)


@pytest.mark.parametrize(("num_items", "size"), [(10, 5), (10, 4), (7, 7), (3, 8), (50, 1)])
def test_catalogue_sample_visits_each_item_once_a_round(num_items, size):
  sample = CatalogueSample(num_items, size, seed=0)
  batches = [sample(index) for index in range(4 * num_items // size + 1)]
  assert {batch.shape for batch in batches} == {(size,)}
  assert {batch.dtype for batch in batches} == {np.dtype(np.int32)}
  walk = np.concatenate(batches)
  rounds = [walk[first : first + num_items] for first in range(0, len(walk) - num_items + 1, num_items)]
  assert len(rounds) >= 3
  for items in rounds:
    np.testing.assert_array_equal(np.sort(items), np.arange(num_items))


def test_catalogue_sample_is_a_function_of_seed_and_number():
  walk = [CatalogueSample(40, 40, seed=0)(index).tolist() for index in range(2)]
  assert CatalogueSample(40, 40, seed=0)(1).tolist() == walk[1]
  assert walk[0] != walk[1]
  assert CatalogueSample(40, 40, seed=1)(0).tolist() != walk[0]


@pytest.mark.parametrize(("batch_size", "max_length"), [(4, 5), (5, 1), (15, 200), (64, 20), (1, 3)])
def test_evaluation_batches_against_brute_force(batch_size, max_length):
  histories = make_histories()
  targets = np.random.default_rng(1).integers(0, 100, histories.num_users)
  batches = list(evaluation_batches(histories, targets, batch_size=batch_size, max_length=max_length))
  assert len(batches) == -(-histories.num_users // batch_size)
  valid = np.concatenate([batch["valid"] for batch in batches])
  np.testing.assert_array_equal(valid, np.arange(len(valid)) < histories.num_users)
  for name in ("items", "segments", "positions"):
    assert {batch[name].shape for batch in batches} == {(batch_size, max_length)}
    assert {batch[name].dtype for batch in batches} == {np.dtype(np.int32)}
  rows = stack(batches, names=("items", "segments", "positions", "targets"))
  np.testing.assert_array_equal(rows["targets"][: histories.num_users], targets)
  for row in range(len(valid)):
    last = histories.history(row)[-max_length:].tolist() if row < histories.num_users else []
    padding = [0] * (max_length - len(last))
    assert rows["items"][row].tolist() == last + padding
    assert rows["segments"][row].tolist() == [1] * len(last) + padding
    assert rows["positions"][row].tolist() == list(range(len(last))) + padding


@pytest.mark.parametrize("users", [[0], [4, 4, 0, 12], [14, 3, 1], list(range(15))])
def test_evaluation_batches_of_some_users_are_their_rows_of_all(users):
  histories = make_histories()
  histories = dataclasses.replace(histories, times=np.cumsum(histories.items) / 7)
  targets = np.arange(histories.num_users)
  (every,) = evaluation_batches(histories, targets, batch_size=15, max_length=5)
  batches = evaluation_batches(histories, targets, batch_size=4, max_length=5, users=np.array(users))
  batches = [{name: grid[batch["valid"]] for name, grid in batch.items()} for batch in batches]
  assert_same_tree(stack(batches, every.keys()), {name: grid[users] for name, grid in every.items()})


def test_rows_hold_histories_and_nothing_else():
  histories = make_histories()
  rows = filled_rows(histories, np.array([3, 0, 7]), num_rows=5, width=10)
  assert rows.dtype == np.int32
  expected = [histories.history(user).tolist() for user in (3, 0, 7)] + [[], []]
  assert rows.tolist() == [own + [-1] * (10 - len(own)) for own in expected]


@pytest.mark.parametrize("bounds", [(), (2, 4)])
def test_a_very_active_user_is_ranked_apart_and_widens_no_other_row(monkeypatch, bounds):
  monkeypatch.setattr(ranking, "_ORDINARY", 8)
  # User 4 has 60 items, 12 has 137, 9 has 21; 2,000 interactions of user 1 are of three items.
  histories = make_histories([0, 2000, *LENGTHS[2:]])
  items = histories.items.copy()
  items[:2000] = 7 + np.arange(2000) % 3
  histories = dataclasses.replace(histories, items=items)
  users = np.array([14, 1, 4, 12, 9, 5, 6, 7, 2, 0])
  targets = np.arange(histories.num_users)
  options = {"users": users, "batch_size": 4, "max_length": 6, "bounds": bounds}
  seen, shapes = [], set()
  for places, batch in ranking_batches(histories, targets, **options, exclude=distinct_items(histories)):
    seen.extend(places.tolist())
    shapes.add(batch["exclude"].shape)
    (plain,) = evaluation_batches(
      histories, targets, users=users[places], batch_size=len(batch["items"]), max_length=batch["items"].shape[1]
    )
    del plain["valid"]
    assert_same_tree({name: grid for name, grid in batch.items() if name != "exclude"}, plain)
    for place, own in zip(places, batch["exclude"][: len(places)].tolist(), strict=True):
      expected = sorted(set(histories.history(users[place]).tolist()))
      assert own == expected + [-1] * (len(own) - len(expected))
  assert sorted(seen) == list(range(len(users)))
  assert {shape for shape in shapes if shape[1] > 8} == {(1, 32), (1, 64), (1, 256)}
  assert all(shape[0] == 4 for shape in shapes if shape[1] <= 8)
  if not bounds:
    assert len(shapes) == 4
    ordinary = np.minimum(histories.lengths_of(users[seen[:7]]), 6).tolist()
    assert sorted(seen[:7]) == [0, 1, 5, 6, 7, 8, 9], "all that are ordinary come first"
    assert ordinary == sorted(ordinary), "by length"
  everybody = list(ranking_batches(histories, targets, **options))
  assert {batch["items"].shape[0] for _, batch in everybody} == {4}
  assert not any("exclude" in batch for _, batch in everybody)


@pytest.mark.parametrize("max_length", [1, 5, 20])
def test_a_prefix_epoch_holds_every_transition_once_with_the_history_before_it(max_length):
  histories = make_histories()
  rows = prefix_epoch(histories, max_length=max_length, seed=3, epoch=2)
  expected = Counter()
  for user in range(histories.num_users):
    items = histories.history(user).tolist()
    expected.update((tuple(items[max(0, t - max_length) : t]), items[t]) for t in range(1, len(items)))
  got = Counter()
  for row in range(len(rows["targets"])):
    count = int(rows["segments"][row].sum())
    assert rows["segments"][row].tolist() == [1] * count + [0] * (max_length - count)
    assert rows["positions"][row].tolist() == [*range(count), *[0] * (max_length - count)]
    assert not rows["items"][row, count:].any()
    got[tuple(rows["items"][row, :count].tolist()), int(rows["targets"][row])] += 1
  assert got == expected
  other = prefix_epoch(histories, max_length=max_length, seed=3, epoch=3)
  assert not np.array_equal(rows["targets"], other["targets"])
  assert sorted(rows["targets"]) == sorted(other["targets"])


def test_batches_of_one_length_hold_every_transition_once_and_are_in_random_order():
  histories = make_histories()
  options = {"max_length": 7, "seed": 3, "epoch": 2}
  rows = prefix_epoch(histories, **options, batch_rows=4, bounds=(1, 3))
  lengths = rows["segments"].sum(axis=1)
  real = lengths > 0
  assert not any(grid[~real].any() for grid in rows.values())

  def bag(rows, chosen):
    return sorted(zip(map(tuple, rows["items"][chosen].tolist()), rows["targets"][chosen].tolist(), strict=True))

  every = prefix_epoch(histories, **options)
  assert bag(rows, real) == bag(every, np.ones(len(every["targets"]), bool))
  groups = []
  for batch in lengths.reshape(-1, 4):
    groups.append(next(number for number, bound in enumerate((1, 3, 7)) if batch.max() <= bound))
    assert batch.max() > 0
    assert all(length > (0, 1, 3)[groups[-1]] for length in batch[batch > 0])
  assert set(groups) == {0, 1, 2}
  assert groups != sorted(groups)
  assert (~real).sum() <= 3 * 3, "at most one batch of each group is filled up"


@pytest.mark.parametrize("bounds", [(), (2, 3)])
def test_prefix_batches_come_again_after_a_resume_and_on_any_number_of_processes(bounds):
  histories = make_histories()
  options = {"batch_rows": 6, "max_length": 5, "seed": 0, "bounds": bounds}
  whole = iter(PrefixHistories(histories, **options))
  parts = [iter(PrefixHistories(histories, **options, process_index=part, process_count=3)) for part in range(3)]
  transitions = sum(max(length - 1, 0) for length in LENGTHS)
  per_epoch = len(prefix_epoch(histories, max_length=5, seed=0, epoch=0, batch_rows=6, bounds=bounds)["items"])
  per_epoch = -(-per_epoch // 6)
  seen, state, after = 0, None, []
  for number in range(per_epoch + 2):
    if number == per_epoch - 1:
      state = json.loads(json.dumps(whole.get_state()))
    batch, shares = next(whole), [next(part) for part in parts]
    for name in ("items", "segments", "positions", "targets"):
      np.testing.assert_array_equal(np.concatenate([share[name] for share in shares]), batch[name])
    longest = int(batch["segments"].sum(axis=1).max())
    assert batch["items"].shape[1] == next(bound for bound in (*bounds, 5) if bound >= longest)
    if number < per_epoch:
      seen += int((batch["segments"][:, 0] > 0).sum())
    if state is not None:
      after.append(batch)
  assert seen == transitions, "the rest of an epoch's last batch is empty"
  resumed = iter(PrefixHistories(histories, **options))
  resumed.set_state(state)
  for expected in after:
    batch = next(resumed)
    assert batch.keys() == expected.keys()
    for name in batch:
      np.testing.assert_array_equal(batch[name], expected[name])


@pytest.mark.parametrize("whole", [True, False])
def test_times_are_seconds_since_a_users_first_interaction(whole):
  histories = make_histories()
  # An item occurs once, so that it tells its time; the clock's start lies far outside of 32 bits.
  times = 1e12 + 10.7 * histories.items
  histories = dataclasses.replace(histories, items=np.sort(histories.items), times=np.sort(times))
  first = np.repeat(histories.times[np.minimum(histories.offsets[:-1], len(times) - 1)], histories.lengths)
  expected = dict(zip(histories.items.tolist(), (histories.times - first).astype(int).tolist(), strict=True))
  rows = packed_epoch(histories, max_length=20, row_length=32, whole=whole, seed=0, epoch=0)
  assert rows["times"].dtype == np.int32
  for window in windows_of(rows):
    assert window["times"] == [expected[item] for item in window["items"]]
  for batch in evaluation_batches(histories, np.zeros(len(LENGTHS), int), batch_size=4, max_length=5):
    real = batch["segments"] > 0
    assert batch["times"][real].tolist() == [expected[item] for item in batch["items"][real].tolist()]
    assert not batch["times"][~real].any()


def test_a_gap_of_centuries_counts_as_the_longest():
  histories = from_lengths(np.arange(2), np.array([2]), np.array(["u"]), np.array([0.0, 1e11]))
  rows = packed_epoch(histories, max_length=5, row_length=5, whole=True, seed=0, epoch=0)
  assert rows["times"].max() == np.iinfo(np.int32).max
