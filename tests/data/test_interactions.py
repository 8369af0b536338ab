"""Histories, and the leave-one-out split, against histories written out by hand."""

import dataclasses

import numpy as np
import pytest

from bbqrec_jax.data import interactions as interactions_module
from bbqrec_jax.data.interactions import (
  distinct_items,
  drop_short_users,
  from_lengths,
  hold_out_last,
  leave_one_out,
  require_users,
  user_blocks,
)
from bbqrec_jax.errors import InputError

HISTORIES = {"ann": [4, 1, 2], "bob": [0, 1, 2, 3, 4], "cy": [3, 3, 0, 1]}


def make(histories):
  items = np.array([item for history in histories.values() for item in history], np.int64)
  return from_lengths(items, np.array([len(h) for h in histories.values()], np.int64), np.array(list(histories), str))


def as_lists(interactions):
  return {str(user): interactions.history(row).tolist() for row, user in enumerate(interactions.users)}


def test_interactions_hold_each_history():
  interactions = make(HISTORIES)
  assert as_lists(interactions) == HISTORIES
  assert (interactions.num_users, interactions.num_interactions) == (3, 12)
  np.testing.assert_array_equal(interactions.lengths, [3, 5, 4])
  np.testing.assert_array_equal(interactions.offsets, [0, 3, 8, 12])
  assert (interactions.items.dtype, interactions.offsets.dtype) == (np.int32, np.int64)
  assert interactions.users.dtype.kind == "U"


def test_history_is_a_view():
  interactions = make(HISTORIES)
  assert np.shares_memory(interactions.history(1), interactions.items)


def test_drop_short_users_keeps_the_others_in_order():
  kept = drop_short_users(make({"a": [1], "b": [1, 2, 3], "c": [], "d": [4, 5, 6, 7], "e": [1, 2]}))
  assert as_lists(kept) == {"b": [1, 2, 3], "d": [4, 5, 6, 7]}
  assert as_lists(drop_short_users(kept, minimum=4)) == {"d": [4, 5, 6, 7]}


def test_a_file_without_users_is_refused():
  with pytest.raises(InputError, match=r"^sequences.txt: expected at least one user, found none; give"):
    require_users(make({}), path="sequences.txt")
  assert as_lists(require_users(make(HISTORIES), path="sequences.txt")) == HISTORIES


def test_leave_one_out_splits_each_history():
  split = leave_one_out(make(HISTORIES))
  assert as_lists(split.train) == {"ann": [4], "bob": [0, 1, 2], "cy": [3, 3]}
  np.testing.assert_array_equal(split.validation_target, [1, 3, 0])
  np.testing.assert_array_equal(split.test_target, [2, 4, 1])
  assert split.validation_target.dtype == split.test_target.dtype == np.int32


def test_the_inputs_of_a_stage_stop_right_before_its_target():
  split = leave_one_out(make(HISTORIES))
  assert as_lists(split.history("validation")) == {"ann": [4], "bob": [0, 1, 2], "cy": [3, 3]}
  assert as_lists(split.history("test")) == {"ann": [4, 1], "bob": [0, 1, 2, 3], "cy": [3, 3, 0]}
  assert split.history("test").items.dtype == np.int32


def test_an_unknown_stage_is_refused():
  with pytest.raises(InputError, match="expected stage 'validation' or 'test', got 'train'"):
    leave_one_out(make(HISTORIES)).history("train")


def test_users_with_fewer_than_3_interactions_are_learned_from_and_not_ranked():
  histories = make({"one": [3]} | HISTORIES | {"two": [1, 2]})
  timed = dataclasses.replace(histories, times=np.arange(histories.num_interactions, dtype=float))
  split, without = leave_one_out(timed), leave_one_out(make(HISTORIES))
  assert as_lists(split.train) == {"one": [3]} | as_lists(without.train) | {"two": [1, 2]}
  for stage in ("validation", "test"):
    assert as_lists(split.history(stage)) == as_lists(without.history(stage))
    mine = split.history(stage)
    assert [timed.items[int(time)] for time in mine.times] == mine.items.tolist()
  assert split.validation_target.tolist() == without.validation_target.tolist()
  assert split.test_target.tolist() == without.test_target.tolist()
  assert [timed.items[int(time)] for time in split.validation_time] == split.validation_target.tolist()
  assert split.split_hash != without.split_hash
  held, users = hold_out_last(split, count=9, seed=0)
  assert as_lists(held.train)["two"] == [1]
  assert held.train.users[users].tolist() == ["bob", "cy", "two"]


def test_where_nobody_can_be_ranked_is_refused():
  with pytest.raises(InputError, match=r"at least 3 interactions .* none of the 2 users has as many"):
    leave_one_out(make({"a": [1], "b": [2, 3]}))


def test_split_hash_is_fixed_for_ever():
  # Written down so that a change of the recipe, which would orphan every published number, is noticed.
  assert leave_one_out(make(HISTORIES)).split_hash == "bfcc1d5b60c24fff"


@pytest.mark.parametrize(
  "other",
  [
    {"ann": [1, 4, 2], "bob": [0, 1, 2, 3, 4], "cy": [3, 3, 0, 1]},
    {"ann": [4, 1, 2, 0], "bob": [1, 2, 3, 4], "cy": [3, 3, 0, 1]},
    {"ann": [4, 1, 2], "bob": [0, 1, 2, 3, 4], "cy": [3, 3, 0, 2]},
  ],
  ids=["order", "borders", "item"],
)
def test_split_hash_changes_with_the_histories(other):
  assert leave_one_out(make(other)).split_hash != leave_one_out(make(HISTORIES)).split_hash


def test_split_hash_ignores_the_labels():
  renamed = dict(zip("xyz", HISTORIES.values(), strict=True))
  assert leave_one_out(make(renamed)).split_hash == leave_one_out(make(HISTORIES)).split_hash


def test_times_stay_with_their_items_through_every_choice():
  histories = make(HISTORIES | {"dee": [1]})
  # A time that says which user and which place it is of.
  times = np.concatenate([100.0 * user + np.arange(length) for user, length in enumerate(histories.lengths)])
  kept = drop_short_users(dataclasses.replace(histories, times=times))
  assert kept.times.tolist() == [0, 1, 2, 100, 101, 102, 103, 104, 200, 201, 202, 203]
  split = leave_one_out(kept)
  assert split.train.times.tolist() == [0, 100, 101, 102, 200, 201]
  assert split.validation_time.tolist() == [1, 103, 202]
  assert split.history("test").times.tolist() == [0, 1, 100, 101, 102, 103, 200, 201, 202]
  assert leave_one_out(drop_short_users(histories)).history("test").times is None


@pytest.mark.parametrize("block", [1, 2, 4, 5, 9, 100])
def test_blocks_hold_every_user_once_and_no_more_than_they_may(monkeypatch, block):
  monkeypatch.setattr(interactions_module, "_BLOCK", block)
  interactions = make(HISTORIES | {"dee": [], "eve": [1]})
  blocks = list(user_blocks(interactions))
  assert [user for users in blocks for user in range(users.start, users.stop)] == list(range(5))
  assert all(interactions.lengths[users].sum() <= block or users.stop - users.start == 1 for users in blocks)


@pytest.mark.parametrize("block", [1, 4, 100])
def test_distinct_items_are_each_users_whole_history_once(monkeypatch, block):
  monkeypatch.setattr(interactions_module, "_BLOCK", block)
  histories = HISTORIES | {"dee": [], "eve": [5] * 50, "fay": [2**31 - 1, 0, 2**31 - 1]}
  interactions = dataclasses.replace(make(histories), times=np.zeros(65))
  own = distinct_items(interactions)
  assert as_lists(own) == {user: sorted(set(history)) for user, history in histories.items()}
  assert (own.items.dtype, own.times) == (np.int32, None)
  assert own.lengths_of(np.array([4, 0])).tolist() == [1, 3]
  assert distinct_items(make({"a": []})).num_interactions == 0


def test_the_last_training_item_is_held_out_where_another_is_left():
  histories = [[1, 2, 3, 4, 5], [6, 7, 8], [9, 8, 7, 6]]
  split = leave_one_out(from_lengths(np.concatenate(histories), np.array([5, 3, 4]), np.array(["a", "b", "c"])))
  held, users = hold_out_last(split, count=9, seed=0)
  assert users.tolist() == [0, 2]
  assert [held.train.history(user).tolist() for user in range(3)] == [[1, 2], [6], [9]]
  assert held.validation_target[users].tolist() == [3, 8]
  assert [split.train.history(user).tolist() for user in range(3)] == [[1, 2, 3], [6], [9, 8]]
  assert held.split_hash != split.split_hash
  some, users = hold_out_last(split, count=1, seed=3)
  assert len(users) == 1
  assert set(users.tolist()) < {0, 2}
  for user in range(3):
    cut = 1 if user in users else 0
    assert (
      some.train.history(user).tolist() == split.train.history(user).tolist()[: len(split.train.history(user)) - cut]
    )
  assert {tuple(hold_out_last(split, count=1, seed=seed)[1].tolist()) for seed in range(20)} == {(0,), (2,)}
