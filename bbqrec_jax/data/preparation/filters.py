"""Which interactions stay, and in which order: plain functions of flat arrays of users, items and times."""

from typing import NamedTuple

import numpy as np


class Order(NamedTuple):
  """Interactions, user by user, in time order.

  Attributes:
    places: [n] int64, which interaction of the file each is.
    tied: how many came at the same second as the one before, of the same user.
  """

  places: np.ndarray
  tied: int


def in_order(
  user: np.ndarray, time: np.ndarray | None, *, ties: str, item_rank: np.ndarray | None = None, seed: int = 0
) -> Order:
  """Sorts interactions by user, then time, then by the rule for ties.

  Args:
    user: [n] int, in the order of the file.
    time: [n] float; None keeps the order of the file.
    ties: "file", "item" (by `item_rank`) or "shuffle" (by `seed`).
    item_rank: [n] int, the place of each interaction's item in the order of ids.
    seed: of a shuffle.
  """
  if time is None:
    return Order(np.argsort(user, kind="stable"), 0)
  keys: tuple[np.ndarray, ...] = (time, user)
  if ties == "item" and item_rank is not None:
    keys = (item_rank, *keys)
  elif ties == "shuffle":
    keys = (np.random.default_rng(seed).permutation(len(user)), *keys)
  index = np.lexsort(keys)
  same = (np.diff(user[index]) == 0) & (np.diff(time[index]) == 0)
  return Order(index, int(same.sum()))


def without_duplicates(user: np.ndarray, item: np.ndarray, time: np.ndarray | None, *, rule: str) -> np.ndarray:
  """Which interactions stay, bool [n].

  Args:
    user: [n] int, user by user in time order.
    item: [n] int.
    time: [n] float; without times none is the very same as another.
    rule: "exact" leaves out all but the first of one user, item and time; "first" and "last" all others of one user and
      item; "consecutive" those directly after one of the same item; "keep" none.
  """
  keep = np.ones(len(user), bool)
  if rule == "consecutive":
    keep[1:] = (np.diff(user) != 0) | (np.diff(item) != 0)
  elif rule in ("first", "last") or (rule == "exact" and time is not None):
    keys = (item, user) if rule != "exact" or time is None else (time, item, user)
    order = np.lexsort(keys)  # Stable: of equal ones the first comes first.
    if rule == "last":
      order = order[::-1]
    again = np.ones(len(order), bool)
    again[:1] = False
    for key in keys:
      again[1:] &= np.diff(key[order]) == 0
    keep[order[again]] = False
  return keep


def repeated(user: np.ndarray, item: np.ndarray, *, least: int) -> np.ndarray:
  """Which interactions are of a user and an item that are together at least `least` times, bool [n]."""
  if least <= 1 or not len(user):
    return np.ones(len(user), bool)
  pair = user.astype(np.int64) * (int(item.max()) + 1) + item
  _, inverse, counts = np.unique(pair, return_inverse=True, return_counts=True)
  return counts[inverse] >= least


def core(user: np.ndarray, item: np.ndarray, *, per_user: int, per_item: int) -> tuple[np.ndarray, int]:
  """The largest part in which every user has `per_user` interactions and every item `per_item`: the k-core.

  Args:
    user: [n] int from 0.
    item: [n] int from 0.
    per_user: least number of a user.
    per_item: least number of an item.

  Returns:
    Which interactions stay, bool [n]; and after how many rounds nothing changed any more.
  """
  left, rounds = np.arange(len(user)), 0
  while True:
    of_user, of_item = np.bincount(user[left]), np.bincount(item[left])
    stay = (of_user[user[left]] >= per_user) & (of_item[item[left]] >= per_item)
    if stay.all():
      break
    left, rounds = left[stay], rounds + 1
  keep = np.zeros(len(user), bool)
  keep[left] = True
  return keep, rounds
