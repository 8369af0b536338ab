"""What is said of a tokenizer while it trains: errors of what items have, R^2, and recall of the next item."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from bbqrec_jax.data.feature_store import FeatureStore
from bbqrec_jax.data.interactions import from_lengths, leave_one_out
from bbqrec_jax.semantic_ids.health import linear_r2
from bbqrec_jax.tokenizer.evaluate import ContrastRecall, Inspection
from bbqrec_jax.tokenizer.model import Tokenizer
from bbqrec_jax.tokenizer.settings import TokenizerSettings
from bbqrec_jax.training.partitioning import SingleDevice

WIDTH, LEVELS, CODES = 5, 2, 4


def least_squares_r2(x, y):
  """The R^2 on odd rows of a fit to the even ones, by NumPy's own solver."""
  x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
  # Columns that sum to zero, as normalised ones do, are one too many but for rounding.
  weights = np.linalg.lstsq(x[::2], y[::2], rcond=1e-5)[0]
  rest = np.square(y[1::2] - x[1::2] @ weights).sum()
  return 1 - rest / np.square(y[1::2] - y[::2].mean(axis=0)).sum()


def test_r2_is_that_of_a_least_squares_fit_on_rows_it_was_not_made_of():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(60, 3))
  y = np.stack([x @ [1.0, -2.0, 0.5] + 3.0, x[:, 0] + rng.normal(size=60)], axis=1)
  assert_allclose(linear_r2(x, y[:, :1]), 1.0, atol=1e-6)
  assert_allclose(linear_r2(x, y), least_squares_r2(x, y), atol=1e-4)
  assert_allclose(linear_r2(y, x), least_squares_r2(y, x), atol=1e-4)
  assert abs(linear_r2(x, y) - linear_r2(y, x)) > 0.1
  # What says nothing tells less of other rows than their mean does.
  noise = rng.normal(size=(60, 3))
  assert linear_r2(noise, y) == pytest.approx(least_squares_r2(noise, y), abs=1e-4)
  assert linear_r2(noise, y) < 0.1


def test_r2_is_not_a_number_of_too_few_rows_or_of_what_does_not_vary():
  rng = np.random.default_rng(1)
  x, y = rng.normal(size=(16, 3)), rng.normal(size=(16, 2))
  assert np.isfinite(linear_r2(x, y))
  assert np.isnan(linear_r2(x[:15], y[:15])), "a fit needs four rows a column, the constant among these"
  assert np.isnan(linear_r2(x, np.ones((16, 2))))


def make_tokenizer(random_params, *, num_items, **choices):
  """The model and random parameters, with codebooks that tell items apart."""
  settings = TokenizerSettings(
    (("text", 5), ("image", 4)), num_items=num_items, code_width=WIDTH, num_levels=LEVELS, num_codes=CODES, hidden=(6,),
    history_heads=1, max_length=5, **choices,
  )  # fmt: skip
  model = Tokenizer(settings)
  features = {name: jnp.zeros((1, width)) for name, width in settings.modalities}
  present = dict.fromkeys(settings.names, jnp.ones(1, bool))
  return model, random_params(model, {"items": jnp.zeros(1, int), "features": features, "present": present})


def test_an_inspection_is_of_the_items_that_have_a_modality_each_once(random_params):
  # More than fit into one block, so that the last one is filled up.
  count = 1100
  model, params = make_tokenizer(random_params, num_items=count)
  rng = np.random.default_rng(2)
  features = {"text": rng.normal(size=(count, 5)), "image": rng.normal(size=(count, 4))}
  present = {"text": rng.random(count) < 0.7, "image": rng.random(count) < 0.5}
  store = FeatureStore(features, present)
  found = Inspection(model, store, seed=0, partitioner=SingleDevice())(params)

  order = np.random.default_rng(0).permutation(count)
  rows, here = store.rows(order)

  @jax.jit
  def parts(params):
    def of(model):
      latents = model.latents(order, rows, here)
      own, specific = model.quantize(latents.values).quantized, model.specific(rows)
      nothing = {name: jnp.zeros_like(value) for name, value in specific.items()}
      rebuilt = model.reconstruct({"text": own[0], "image": own[1]}, specific)
      return latents.values, specific, rebuilt, model.reconstruct({"text": own[-1], "image": own[-1]}, nothing)

    return model.apply({"params": params}, method=of)

  latents, specific, rebuilt, of_codes = jax.device_get(parts(params))
  for stream, name in enumerate(("text", "image")):
    has = here[name]
    for figure, values in (("reconstruction", rebuilt), ("reconstruction_from_codes", of_codes)):
      error = np.square(values[name].astype(np.float64) - rows[name]).mean(axis=1)
      assert_allclose(found[figure][name], error[has].mean(), rtol=1e-4)
      assert abs(error[has].mean() - error.mean()) > 1e-3, "absent items would not show"
    expected, turned = (
      least_squares_r2(*(pair.astype(np.float64) for pair in pairs))
      for pairs in ((specific[name][has], latents[stream][has]), (latents[stream][has], specific[name][has]))
    )
    assert_allclose(found["specific_r2"][name], expected, atol=1e-3)
    assert abs(turned - expected) > 0.02, "the other way round would not show"


@pytest.mark.parametrize("item_id", ["added", "none"])
def test_recall_is_of_the_last_state_of_a_history_against_codewords_and_the_id(random_params, item_id):
  items, users = 60, 200
  model, params = make_tokenizer(random_params, num_items=items, item_id=item_id)
  rng = np.random.default_rng(3)
  lengths = rng.integers(3, 12, users)
  split = leave_one_out(from_lengths(rng.integers(items, size=lengths.sum()), lengths, np.arange(users).astype(str)))
  assert split.train.lengths.max() > 5, "no history is longer than what the model is shown"
  streams = model.settings.streams
  latents = rng.normal(size=(len(streams), items, WIDTH)).astype(np.float32)
  codes = rng.integers(CODES, size=(items, LEVELS))

  codewords = sum(np.asarray(params["codebooks"])[0, level][codes[:, level]] for level in range(LEVELS))
  vectors = codewords + latents[streams.index("id")] if item_id == "added" else codewords
  recent = [split.train.history(user)[-5:] for user in range(users)]
  grid = np.zeros((users, 5), int)
  for user, own in enumerate(recent):
    grid[user, : len(own)] = own
  segments = (np.arange(5) < np.array([[len(own)] for own in recent])).astype(int)

  @jax.jit
  def history_states(params, given):
    positions = jnp.tile(jnp.arange(5), (users, 1))
    return model.apply({"params": params}, given, segments, positions, deterministic=True, method="history_states")

  def recall(vectors, *, places):
    states = history_states(params, vectors[grid])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    hits = 0.0
    for user, target in enumerate(split.validation_target):
      state = np.asarray(states)[user, places[user]]
      scores = unit @ state / np.linalg.norm(state)
      tied = np.all(vectors == vectors[target], axis=1)  # In random order.
      before = np.sum(scores[~tied] > scores[target])
      hits += np.mean(before + np.arange(tied.sum()) < 10)
    return hits / users

  last = segments.sum(axis=1) - 1
  expected = recall(vectors, places=last)
  assert expected != recall(vectors, places=np.zeros(users, int)), "the example does not tell places apart"
  assert item_id == "none" or expected != recall(codewords, places=last), "the example does not show the id"
  judge = ContrastRecall(model, split, partitioner=SingleDevice())
  assert judge(params, latents, codes) == pytest.approx(expected, abs=1e-6)
