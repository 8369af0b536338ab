"""What the similarity bias costs: a training step of the causal backbone with it and without, in turns.

    python experiments/benchmark_bias.py --config=configs/benchmark.py:small

The steps are those of `bbqrec benchmark`, at its small size rows of 50 positions, d 64, two layers, two heads, two
streams of codes (so three pairs of streams), 32 buckets. Prints medians over the rounds.
"""

import statistics
import time

import jax
from absl import flags
from ml_collections import config_flags

from bbqrec_jax.benchmarks.cases import random_dataset, random_ids, recommender_cases
from bbqrec_jax.command_line import start
from bbqrec_jax.utils.host_memory import keep_memory

ROUNDS = 15


def main(argv: list[str]) -> None:
  """Prints a line a head."""
  del argv
  keep_memory()
  config = flags.FLAGS.config
  dataset = random_dataset(config)
  heads, ids = ("generative", "dense"), random_ids(config, dataset.modalities)
  config.recommenders = {f"{head}/{bias}": {"head": head} | ({} if bias else {"similarity": ()})
                         for head in heads for bias in (0, 1)}  # fmt: skip
  cases = {case.name: case for case in recommender_cases(config, dataset, ids, list(config.recommenders))}
  print("| head | without, ms | with, ms | cost |\n|---|---|---|---|")
  for head in heads:
    sides = [cases[f"{head}/{bias}/train step"].make() for bias in (0, 1)]
    seconds: list[list[float]] = [[], []]
    for turn in range(ROUNDS + 2):
      for side, taken in zip(sides, seconds, strict=True):
        start = time.perf_counter()
        jax.block_until_ready(side())
        if turn >= 2:  # The first compiles, the second warms up.
          taken.append(time.perf_counter() - start)
    plain, biased = (1000 * statistics.median(taken) for taken in seconds)
    print(f"| {head} | {plain:.1f} | {biased:.1f} | {biased / plain - 1:+.1%} |", flush=True)


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "configs/benchmark.py:small, :paper or :large.")
  flags.mark_flag_as_required("config")
  start(main)
