"""What the similarity bias costs: a training step of the causal backbone with it and without, in turns.

    python experiments/benchmark_bias.py

Histories of 50 items packed without padding, d 64, two layers, two heads, 12,101 random items with two streams of codes
(so three pairs of streams), 32 buckets. Prints medians over the rounds.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bbqrec_jax.models.catalogue import Catalogue, RecommenderSettings, code_columns
from bbqrec_jax.models.recommender import Recommender
from bbqrec_jax.semantic_ids.trie import build_trie
from bbqrec_jax.train.state import TrainState
from bbqrec_jax.train.steps import make_recommender_step

ITEMS, LEVELS, CODES, STREAMS, BUCKETS = 12_101, 4, 256, 2, 32
ROWS, LENGTH, ROUNDS = 32, 50, 15


def make(head: str, streams: int):
  """A function that takes one training step."""
  rng = np.random.default_rng(0)
  chosen = rng.choice(CODES**LEVELS, size=ITEMS, replace=False)
  ids = np.stack(np.unravel_index(chosen, (CODES,) * LEVELS), axis=1)
  settings = RecommenderSettings(
    ITEMS, LEVELS, CODES, num_columns=LEVELS, head=head, max_length=LENGTH, num_streams=streams, num_buckets=BUCKETS,
    dropout=0.2,
  )  # fmt: skip
  vectors = rng.normal(size=(ITEMS, streams, 32)).astype(np.float32)
  catalogue = Catalogue(
    semantic_ids=jnp.asarray(ids, jnp.int32),
    columns=jnp.asarray(code_columns([ids], [np.ones(ITEMS, bool)], num_codes=CODES)),
    streams=jnp.asarray(vectors),
    edges=jnp.asarray(np.tile(np.linspace(-0.3, 0.3, BUCKETS - 1, dtype=np.float32), (len(settings.pairs), 1))),
    trie=build_trie(ids),
  )
  items, targets = rng.integers(ITEMS, size=(2, ROWS, LENGTH)).astype(np.int32)
  place = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), items.shape)
  batch = {"items": items, "targets": targets, "segments": np.ones_like(items), "positions": place}
  model, optimizer = Recommender(settings), optax.adamw(1e-3)
  params = jax.jit(model.init)(jax.random.key(0), catalogue, batch)["params"]
  step = jax.jit(functools.partial(make_recommender_step(model, optimizer), axis_name=None), donate_argnums=0)
  state = TrainState.create(params, optimizer, seed=0)

  def run():
    nonlocal state
    state, metrics = step(state, catalogue, batch)
    jax.block_until_ready(metrics)

  return run


def main() -> None:
  """Prints a line a head."""
  print("| head | without, ms | with, ms | cost |\n|---|---|---|---|")
  for head in ("generative", "dense"):
    sides = [make(head, streams) for streams in (0, STREAMS)]
    seconds: list[list[float]] = [[], []]
    for turn in range(ROUNDS + 2):
      for side, taken in zip(sides, seconds, strict=True):
        start = time.perf_counter()
        side()
        if turn >= 2:  # The first compiles, the second warms up.
          taken.append(time.perf_counter() - start)
    plain, biased = (1000 * statistics.median(taken) for taken in seconds)
    print(f"| {head} | {plain:.1f} | {biased:.1f} | {biased / plain - 1:+.1%} |", flush=True)


if __name__ == "__main__":
  main()
