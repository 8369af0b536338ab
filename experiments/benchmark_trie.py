"""Size and speed of the trie of semantic IDs, from ten thousand to ten million items.

    python experiments/benchmark_trie.py --items=10000,1000000,10000000

For each number of items, distinct random IDs of four levels of 256 codes: how long the trie takes to build, what it
holds, the peak memory on the way, and how long a beam search over it takes for a batch, beside the same search with
nothing to constrain it (every code of every level is allowed), whose decoder costs nothing: what is left is the search.
"""

import json
import pathlib
import resource
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from bbqrec_jax.command_line import start
from bbqrec_jax.semantic_ids.beam import beam_search
from bbqrec_jax.semantic_ids.trie import Trie, build_trie

LEVELS, CODES = 4, 256


def resident() -> int:
  """Resident memory of this process in bytes (Linux)."""
  pages = int(pathlib.Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
  return pages * resource.getpagesize()


def random_ids(items: int) -> np.ndarray:
  """[items, 4] int32, all distinct."""
  rng = np.random.default_rng(0)
  numbers = np.unique(rng.integers(CODES**LEVELS, size=items + items // 100 + 10, dtype=np.uint32))
  numbers = rng.permutation(numbers)[:items]
  return np.stack([(numbers >> shift) & 255 for shift in (24, 16, 8, 0)], axis=1).astype(np.int32)


def search(trie: Trie, tables: jax.Array, width: int) -> jax.Array:
  """Items found for a batch; `tables` [L, B, K] are the log-probabilities of each level, the same for every beam."""

  def step(state, level, codes):
    beams = 1 if codes is None else codes.shape[1]
    return jnp.repeat(tables[level][:, None], beams, axis=1), state

  return beam_search(trie, step, {}, batch=tables.shape[1], width=width, normalize=True).items


def unconstrained(tables: jax.Array, width: int) -> jax.Array:
  """The same search when every code may follow every other: the codes found, [B, W]."""
  scores = jnp.zeros((tables.shape[1], 1))
  for level in range(LEVELS):
    candidates = (scores[..., None] + jax.nn.log_softmax(tables[level])[:, None]).reshape(len(scores), -1)
    scores, chosen = jax.lax.top_k(candidates, min(width, candidates.shape[1]))
  return chosen


def milliseconds(function, *args) -> float:
  """Median over windows, after the first call has compiled."""
  jax.block_until_ready(function(*args))
  times = []
  for _ in range(15):
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    times.append(time.perf_counter() - start)
  return 1000 * statistics.median(times)


def main(argv: list[str]) -> None:
  """Prints a record for each number of items."""
  del argv
  options = flags.FLAGS
  rng = np.random.default_rng(1)
  tables = jnp.asarray(rng.normal(size=(LEVELS, options.batch, CODES)), jnp.float32)
  plain = milliseconds(jax.jit(lambda tables: unconstrained(tables, options.beam_width)), tables)
  for text in options.items:
    ids = random_ids(int(text))
    floor, start = resident(), time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    trie = build_trie(ids)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(trie))
    run = jax.jit(lambda trie, tables: search(trie, tables, options.beam_width))
    constrained = milliseconds(run, trie, tables)
    record = {
      "items": len(ids),
      "build seconds": round(seconds, 2),
      "trie MiB": round(size / 2**20, 1),
      "bytes an item": round(size / len(ids), 1),
      # A peak that an earlier record set says nothing of this one.
      "peak MiB above the IDs": round((peak - floor) / 2**20) if peak > before else None,
      "widest node": list(trie.fanouts),
      "ms a search": round(constrained, 3),
      "ms without a trie": round(plain, 3),
    }
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
  flags.DEFINE_list("items", ["10000", "1000000", "10000000"], "Numbers of items.")
  flags.DEFINE_integer("batch", 16, "Users at once.")
  flags.DEFINE_integer("beam_width", 20, "Beams of each.")
  start(main)
