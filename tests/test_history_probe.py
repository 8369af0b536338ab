"""The history transformer on frozen vectors: it learns what they tell of the next item, from training data alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.config import default_config
from bbqrec_jax.data.interactions import from_lengths, leave_one_out
from bbqrec_jax.tokenizer.settings import TokenizerSettings
from bbqrec_jax.training.optimizer import make_optimizer
from bbqrec_jax.training.partitioning import Pmap, SingleDevice
from bbqrec_jax.training.state import TrainState

pytestmark = pytest.mark.usefixtures("compile_cache")

ITEMS, USERS, LENGTH, WIDTH = 40, 64, 8, 12
SHOWN = 4  # Fewer than any history has, so that each place is trained.


def make_config(**changes):
  config = default_config()
  config.update_from_flattened_dict({
    "partitioner": "single", "tokenizer.code_width": 16, "tokenizer.max_length": SHOWN,
    "tokenizer.row_length": 2 * SHOWN, "tokenizer.batch_rows": 8, "tokenizer.optimizer.warmup_steps": 5,
    "tokenizer.optimizer.learning_rate": 0.01, "tokenizer.temperature": 0.1, **changes,
  })  # fmt: skip
  return config


def split_of(items):
  return leave_one_out(from_lengths(items.reshape(-1), np.full(len(items), items.shape[1]), np.arange(len(items))))


@pytest.fixture(scope="module")
def probe(load_file):
  return load_file("experiments/history_probe.py")


@pytest.fixture(scope="module")
def vectors():
  return np.random.default_rng(0).normal(size=(ITEMS, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def circle():
  """Histories that go around the items in order, [USERS, LENGTH]."""
  return (np.random.default_rng(1).integers(ITEMS, size=(USERS, 1)) + np.arange(LENGTH)) % ITEMS


def test_what_follows_what_is_learned_as_far_as_the_vectors_tell_items_apart(probe, vectors, circle):
  chance = 10 / ITEMS
  told = probe.train_probe(make_config(), vectors, split_of(circle), steps=100, evaluate_every=50)
  assert min(told.validation, told.test) > 3 * chance
  same = probe.train_probe(make_config(), np.ones_like(vectors), split_of(circle), steps=20, evaluate_every=20)
  assert (same.validation, same.test) == pytest.approx((chance, chance)), "ties stand in random order"
  disorder = np.random.default_rng(2).integers(ITEMS, size=circle.shape)
  untold = probe.train_probe(make_config(), vectors, split_of(disorder), steps=60, evaluate_every=60)
  assert max(untold.validation, untold.test) < 2 * chance


@pytest.fixture
def judged(probe, monkeypatch):
  """A function that trains a probe with given recalls: (result, what the judge was shown at each call)."""

  def train(recalls, *args, **options):
    shown, rest = [], iter(recalls)

    def judge(*given):
      shown.append(jax.device_get(given[:2]) + given[2:])
      return next(rest)

    monkeypatch.setattr(probe, "SequenceRecall", lambda *_, **__: judge)
    return probe.train_probe(*args, **options), shown

  return train


def assert_trees_equal(ours, theirs):
  jax.tree.map(assert_array_equal, ours, theirs)


def test_the_step_that_is_best_on_validation_is_the_one_that_is_tested(probe, judged, vectors, circle):
  split = split_of(circle)
  result, shown = judged([0.1, 0.5, 0.5, 0.3, 0.2], make_config(), vectors, split, steps=7, evaluate_every=2)
  assert result == probe.ProbedRecall(0.5, 0.2, 4)
  params, mapped, histories, targets = zip(*shown, strict=True)
  assert_trees_equal(params[-1], params[1])
  assert np.any(params[1]["map"]["kernel"] != params[2]["map"]["kernel"])
  assert_array_equal(mapped[-1], mapped[1])
  for asked in range(4):
    assert_array_equal(histories[asked].items, split.train.items)
    assert_array_equal(targets[asked], split.validation_target)
  assert_array_equal(histories[-1].items.reshape(USERS, -1), circle[:, :-1])
  assert_array_equal(targets[-1], circle[:, -1])


def test_training_sees_training_interactions_and_the_seed_alone(judged, vectors, circle):
  def trained(items, seed=0):
    _, shown = judged([0.1, 0.2], make_config(seed=seed), vectors, split_of(items), steps=3, evaluate_every=3)
    return shown[0][0]

  known, held_out, in_training = trained(circle), circle.copy(), circle.copy()
  held_out[:, -2:] = (held_out[:, -2:] + 7) % ITEMS
  assert_trees_equal(trained(held_out), known)
  in_training[0, 0] = (in_training[0, 0] + 7) % ITEMS
  for other in (trained(in_training), trained(circle, seed=1)):
    assert np.any(other["map"]["kernel"] != known["map"]["kernel"])


def test_neither_scale_nor_place_of_the_vectors_counts(judged, vectors, circle):
  def mapped(vectors):
    return judged([0.1, 0.2], make_config(), vectors, split_of(circle), steps=3, evaluate_every=3)[1][0][1]

  assert_allclose(mapped(1 + 100 * vectors), mapped(vectors), atol=1e-3)
  turned = vectors * np.linspace(0.1, 2, WIDTH, dtype=np.float32)
  assert np.abs(mapped(turned) - mapped(vectors)).max() > 0.1, "directions keep their weight"


@pytest.mark.parametrize("partitioner", [SingleDevice, Pmap])
def test_the_loss_of_a_step_is_the_contrast_of_states_and_next_items_over_all_devices(probe, vectors, partitioner):
  rows, columns = 4, 5
  model = probe.HistoryProbe(
    TokenizerSettings((), ITEMS, code_width=8, max_length=columns, dropout=0.0, temperature=0.5)
  )
  optimizer, partitioner = make_optimizer(make_config().tokenizer.optimizer, total_steps=2), partitioner()
  segments = np.array([[1, 1, 1, 2, 2], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 2, 2, 2, 0]], np.int32)
  positions = np.array([[0, 1, 2, 0, 1], [0, 1, 0, 0, 0], [0, 1, 2, 3, 4], [0, 0, 1, 2, 0]], np.int32)
  items = np.random.default_rng(3).integers(6, size=(rows, columns)).astype(np.int32)
  params = model.init(jax.random.key(0), jnp.asarray(vectors)[items], segments, positions)["params"]

  def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  mapped = model.apply({"params": params}, jnp.asarray(vectors)[items], method="vectors")
  states = model.apply({"params": params}, mapped, segments, positions, deterministic=True, method="history_states")
  pairs = [(r, t) for r, t in np.ndindex(rows, columns - 1) if 0 < segments[r, t] == segments[r, t + 1]]
  next_items = np.array([items[r, t + 1] for r, t in pairs])
  assert len(set(next_items)) < len(pairs) == 10, "no item occurs twice: the example leaves that untried"
  queries, targets = (
    unit(np.array([array[place] for place in places], np.float64))
    for array, places in ((states, pairs), (mapped, [(r, t + 1) for r, t in pairs]))
  )
  scores = queries @ targets.T / 0.5
  losses = []
  for row in range(len(pairs)):
    kept = (next_items != next_items[row]) | (np.arange(len(pairs)) == row)
    losses.append(np.log(np.exp(scores[row, kept]).sum()) - scores[row, row])

  step = partitioner.compile_step(probe.make_probe_step(model, optimizer))
  state = partitioner.create(lambda: TrainState.create(params, optimizer, seed=0))
  batch = {"items": items, "segments": segments, "positions": positions}
  state, metrics = step(state, partitioner.place(vectors), batch)
  assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-4)
  assert metrics["gradient_norm"] > 0


def test_the_vectors_of_an_id_are_the_codewords_that_were_chosen_before_repair(probe, ids):
  def codewords(stream):
    return sum(ids.codebooks[0, level][ids.stream_codes[stream, :, level]] for level in range(3))

  fused = probe.id_vectors(dataclasses.replace(ids, settings={"semantic_id": "fused"}))
  assert_allclose(fused, codewords(2), rtol=1e-6)
  both = probe.id_vectors(dataclasses.replace(ids, settings={"semantic_id": "concatenated"}))
  has_image = ids.present[1]
  assert_allclose(both[:, :5], codewords(0), rtol=1e-6)
  assert_allclose(both[has_image, 5:], codewords(1)[has_image], rtol=1e-6)
  assert not both[~has_image, 5:].any()
