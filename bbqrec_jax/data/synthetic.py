"""Invented data whose structure is known: one set of latent tastes drives both the histories and the features.

It shows that the machinery works, on any machine and in minutes; it says nothing about how a method fares on real data.
The recipe is this project's choice.
"""

import numpy as np

from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.features import BLOCK
from bbqrec_jax.data.interactions import from_lengths
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.errors import InputError

GROUPS, SUBGROUPS = 8, 8
LATENT_WIDTH = 16
WIDTHS = {"text": 64, "image": 96}
NUISANCE_WIDTH = 8
NEIGHBOURS = 32
MIN_LENGTH, MAX_LENGTH = 5, 25
IMAGE_COVERAGE = 0.9


def make_synthetic(*, num_users: int = 2_000, num_items: int = 600, seed: int = 0) -> Dataset:
  """Makes a catalogue and its users.

  - An item's latent is its group's centre, plus its subgroup's, plus a part of its own; on the unit sphere.
  - A user has a favourite item. The next item is one of the 32 nearest to the last item or, one time in seven, to the
    favourite: nearer and more popular ones more often, none twice while there are others.
  - It comes minutes after the one before it, or days, whatever the items.
  - A modality's features are a linear image of the latents and of nuisance factors that behaviour does not know, plus
    noise. About one item in ten has no image: its row is all zero.

  Args:
    num_users: U, at least 1.
    num_items: N, at least 10.
    seed: a non-negative integer; the same one gives the same data.

  Returns:
    The data set, with 5 to 25 interactions a user, about 10 on average, and the modalities "text" [N, 64] and "image"
    [N, 96] float32.

  Raises:
    InputError: if a number is out of range.
  """
  for name, value, least in (("num_users", num_users, 1), ("num_items", num_items, 10), ("seed", seed, 0)):
    if value < least:
      raise InputError(f"--config.data.synthetic.{name}: expected at least {least}, got {value}; raise it")
  rng = np.random.default_rng(seed)
  subgroup = rng.integers(GROUPS * SUBGROUPS, size=num_items)
  latents = _make_latents(rng, subgroup)
  popularity = rng.permutation((1.0 + np.arange(num_items)) ** -0.3)
  histories, lengths = _make_histories(rng, latents, popularity, num_users)
  features = {name: _make_features(rng, latents, width) for name, width in WIDTHS.items()}
  present = {name: np.ones(num_items, bool) for name in WIDTHS}
  present["image"] = rng.random(num_items) < IMAGE_COVERAGE
  features["image"][~present["image"]] = 0.0
  return Dataset(
    name="synthetic (planted structure)",
    source="synthetic",
    interactions=from_lengths(
      histories, lengths, np.arange(num_users).astype(str), _make_times(lengths, np.random.default_rng([seed, 1]))
    ),
    features=features,
    present=present,
    item_ids=ItemIds.numbered(num_items),
    titles=tuple(
      f"item {item} (taste {taste // SUBGROUPS}.{taste % SUBGROUPS})" for item, taste in enumerate(subgroup)
    ),
  )


def _make_latents(rng: np.random.Generator, subgroup: np.ndarray) -> np.ndarray:
  """[N, 16] float64 of unit length."""
  centres = rng.normal(size=(GROUPS, LATENT_WIDTH)).repeat(SUBGROUPS, axis=0)
  centres += 0.7 * rng.normal(size=centres.shape)
  latents = centres[subgroup] + 0.4 * rng.normal(size=(len(subgroup), LATENT_WIDTH))
  return latents / np.linalg.norm(latents, axis=1, keepdims=True)


def _make_histories(
  rng: np.random.Generator, latents: np.ndarray, popularity: np.ndarray, num_users: int
) -> tuple[np.ndarray, np.ndarray]:
  """The items of all users, one user after another, [total] int64, and their lengths [U] int64."""
  neighbours, log_weights = _nearest(latents, popularity)
  lengths = np.minimum(MIN_LENGTH - 1 + rng.geometric(1 / 6, size=num_users), MAX_LENGTH)
  favourites = rng.choice(len(latents), size=num_users, p=popularity / popularity.sum())
  histories = np.full((num_users, MAX_LENGTH), -1)
  histories[:, 0] = favourites
  for step in range(1, MAX_LENGTH):
    origin = np.where(rng.random(num_users) < 1 / 7, favourites, histories[:, step - 1])
    candidates = neighbours[origin]
    taken = np.any(histories[:, :step, None] == candidates[:, None, :], axis=1)
    # The largest of log weight + Gumbel noise is a draw in proportion to the weights.
    scores = log_weights[origin] + rng.gumbel(size=candidates.shape) - 1e6 * taken
    histories[:, step] = np.take_along_axis(candidates, scores.argmax(axis=1)[:, None], axis=1)[:, 0]
  return histories[np.arange(MAX_LENGTH) < lengths[:, None]], lengths


def _make_times(lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """When each interaction came, [total] float64 seconds: minutes after the one before it, or days."""
  gaps = rng.exponential(np.where(rng.random(lengths.sum()) < 0.5, 120.0, 5 * 86400.0))
  since = np.cumsum(gaps)
  return np.round(since - np.repeat(since[np.cumsum(lengths) - lengths], lengths))


def _nearest(latents: np.ndarray, popularity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The nearest items of each item, not itself, [N, k] int64, and the log of their weights as its successors."""
  num_items = len(latents)
  count = min(NEIGHBOURS, num_items - 1)
  neighbours = np.empty((num_items, count), np.int64)
  log_weights = np.empty((num_items, count))
  step = max(1, BLOCK // num_items)
  for start in range(0, num_items, step):
    rows = np.arange(start, min(start + step, num_items))
    cosines = latents[rows] @ latents.T
    cosines[np.arange(len(rows)), rows] = -np.inf
    # In the order of their numbers: how a partition orders them depends on what the CPU can do, and so would the draws.
    neighbours[rows] = np.sort(np.argpartition(-cosines, count - 1, axis=1)[:, :count], axis=1)
    log_weights[rows] = 8.0 * np.take_along_axis(cosines, neighbours[rows], axis=1)
  return neighbours, log_weights + np.log(popularity)[neighbours]


def _make_features(rng: np.random.Generator, latents: np.ndarray, width: int) -> np.ndarray:
  """[N, width] float32."""
  signal = 2.0 * latents @ rng.normal(size=(LATENT_WIDTH, width))
  nuisance = rng.normal(size=(len(latents), NUISANCE_WIDTH)) @ rng.normal(size=(NUISANCE_WIDTH, width))
  noise = rng.normal(size=(len(latents), width))
  return (signal + 0.5 * nuisance + 0.5 * noise).astype(np.float32)
