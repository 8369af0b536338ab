"""The planted data: its shape, and that what was planted can be found by oracles that know where to look."""

from types import SimpleNamespace

import numpy as np
import pytest

from bbqrec_jax.data.features import features_hash
from bbqrec_jax.data.interactions import leave_one_out
from bbqrec_jax.data.sources import format_statistics, load, make_synthetic, statistics
from bbqrec_jax.errors import InputError


@pytest.fixture(scope="module")
def dataset():
  return make_synthetic()


def recall_at_10(scores, targets):
  own = np.take_along_axis(scores, targets[:, None], axis=1)
  return np.mean(np.sum(scores >= own, axis=1) <= 10)  # Ties count against the target.


def cosines(features):
  """[N, N]; an all-zero row is alike to nothing."""
  there = features.any(axis=1, keepdims=True)
  centred = np.where(there, features - features[there[:, 0]].mean(axis=0), 0.0)
  unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-9)
  return unit @ unit.T


def test_it_has_the_promised_shape(dataset):
  lengths = dataset.interactions.lengths
  assert (dataset.num_items, dataset.interactions.num_users) == (600, 2000)
  assert (lengths.min(), lengths.max()) == (5, 25)
  assert 9 < lengths.mean() < 11
  assert 0 <= dataset.interactions.items.min() <= dataset.interactions.items.max() < 600
  assert dataset.modalities == ("text", "image")
  assert {name: (array.shape, array.dtype) for name, array in dataset.features.items()} == {
    "text": ((600, 64), np.float32),
    "image": ((600, 96), np.float32),
  }
  assert dataset.present["text"].all()
  assert 0.85 < dataset.present["image"].mean() < 0.95
  np.testing.assert_array_equal(dataset.present["image"], dataset.features["image"].any(axis=1))
  assert dataset.titles[17].startswith("item 17 (taste ")


def test_no_history_repeats_an_item(dataset):
  interactions = dataset.interactions
  for user in range(interactions.num_users):
    history = interactions.history(user)
    assert len(set(history.tolist())) == len(history)


def test_it_is_called_synthetic(dataset):
  assert dataset.source == "synthetic"
  text = format_statistics(statistics(dataset, leave_one_out(dataset.interactions)))
  assert text.startswith("data: synthetic (planted structure)\n")


def test_a_seed_fixes_everything(dataset):
  again, other = make_synthetic(), make_synthetic(seed=1)
  np.testing.assert_array_equal(again.interactions.items, dataset.interactions.items)
  assert again.titles == dataset.titles
  hashes = [features_hash(data.features, data.present) for data in (dataset, again, other)]
  assert hashes[0] == hashes[1] != hashes[2]


def test_the_documented_figures_are_of_this_data(dataset, request):
  figures = statistics(dataset, leave_one_out(dataset.interactions))
  shown = f"600 items, {figures['interactions']:,} interactions, split `{figures['split_hash']}`"
  assert shown in (request.config.rootpath / "docs" / "results" / "index.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("order", [1, -1])
def test_how_a_partition_orders_neighbours_does_not_change_the_data(dataset, order, monkeypatch):
  partition = np.argpartition

  def ordered(array, kth, axis):
    first, rest = np.split(partition(array, kth, axis=axis), [kth + 1], axis=axis)
    return np.concatenate([first[:, ::order], rest], axis=axis)

  monkeypatch.setattr(np, "argpartition", ordered)
  np.testing.assert_array_equal(make_synthetic().interactions.items, dataset.interactions.items)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_oracles_find_what_was_planted_and_popularity_does_not(seed):
  dataset = make_synthetic(seed=seed)
  split = leave_one_out(dataset.interactions)
  history = split.history("test")
  last = history.items[history.offsets[1:] - 1]
  counts = np.bincount(split.train.items, minlength=dataset.num_items).astype(float)
  popularity = recall_at_10(np.tile(counts, (len(last), 1)), split.test_target)
  assert popularity < 0.06

  train = split.train
  follows = np.ones(train.num_interactions - 1, bool)
  follows[train.offsets[1:-1] - 1] = False  # The next user's first item follows nothing.
  transitions = np.zeros((dataset.num_items, dataset.num_items))
  np.add.at(transitions, (train.items[:-1][follows], train.items[1:][follows]), 1.0)
  behaviour = recall_at_10(transitions[last] + 1e-3 * counts / counts.max(), split.test_target)
  assert 5 * popularity < behaviour < 15 * popularity

  # Features alone point at the next item too, in each modality: there is something to bind.
  seen = np.zeros((history.num_users, dataset.num_items))
  seen[np.repeat(np.arange(history.num_users), history.lengths), history.items] = 1.0
  for features in dataset.features.values():
    content = recall_at_10(cosines(features)[last] - 9.0 * seen, split.test_target)
    assert content > 4 * popularity


def test_modalities_hold_something_that_behaviour_does_not(dataset):
  # Each modality's neighbours differ from the other's by more than the shared latents would make them.
  both = dataset.present["image"]
  upper = np.triu_indices(int(both.sum()), 1)
  text, image = (cosines(dataset.features[name][both])[upper] for name in ("text", "image"))
  assert 0.4 < np.corrcoef(text, image)[0, 1] < 0.98


@pytest.mark.parametrize(("num_users", "num_items"), [(1, 10), (3, 12), (50, 40)])
def test_small_sizes_work(num_users, num_items):
  dataset = make_synthetic(num_users=num_users, num_items=num_items)
  assert dataset.num_items == num_items
  assert len(leave_one_out(dataset.interactions).test_target) == num_users
  assert dataset.present["image"].any()


@pytest.mark.parametrize(("name", "value"), [("num_users", 0), ("num_items", 9), ("seed", -1)])
def test_impossible_sizes_are_refused(name, value):
  with pytest.raises(InputError, match=f"--config.data.synthetic.{name}: expected at least .*, got {value}"):
    make_synthetic(**{name: value})


def settings(**changes):
  made = SimpleNamespace(num_users=20, num_items=30, seed=3)
  defaults = {
    "source": "synthetic", "path": "", "modalities": (), "drop_short_users": False, "drop_incomplete_items": False,
    "synthetic": made,
  }  # fmt: skip
  return SimpleNamespace(**(defaults | changes))


def test_load_makes_synthetic_data():
  dataset = load(settings())
  expected = make_synthetic(num_users=20, num_items=30, seed=3)
  np.testing.assert_array_equal(dataset.interactions.items, expected.interactions.items)
  assert dataset.modalities == ("image", "text")
  assert load(settings(modalities=("text",))).modalities == ("text",)


@pytest.mark.parametrize(
  ("changes", "parts"),
  [
    ({"source": "csv"}, ["--config.data.source", "synthetic, directory, recbole", "got 'csv'"]),
    ({"modalities": ("audio",)}, ["image, text", "got 'audio'"]),
    ({"path": "beauty"}, ["--config.data.path", "got 'beauty'", "--config.data.source=directory"]),
  ],
  ids=["source", "modality", "path"],
)
def test_load_refuses_what_it_cannot_give(changes, parts):
  with pytest.raises(InputError) as error:
    load(settings(**changes))
  message = str(error.value)
  assert "\n" not in message
  assert all(part in message for part in parts), message
