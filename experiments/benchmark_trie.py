"""Size and speed of the trie of semantic IDs, from ten thousand to ten million items.

    python experiments/benchmark_trie.py --items=10000,1000000,10000000 --beam_width=20,50,200

For each number of items, distinct random IDs of four levels of 256 codes: how long the trie takes to build, what it
holds, the peak memory on the way, and for each width how long a beam search over it takes for a batch, beside the same
search with nothing to constrain it (every code of every level is allowed), in turns. The decoder costs nothing: what is
left is the search.
"""

import functools
import json
import pathlib
import resource
import statistics
import time
from collections.abc import Callable, Iterator

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


def milliseconds(calls: dict[str, Callable[[], jax.Array]]) -> dict[str, float]:
  """The median of each over rounds in which they take turns, after first calls that compile."""
  times: dict[str, list[float]] = {name: [] for name in calls}
  for turn in range(16):
    for name, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      if turn:
        times[name].append(time.perf_counter() - start)
  return {name: 1000 * statistics.median(took) for name, took in times.items()}


def records(items: int, widths: list[int], *, batch: int) -> Iterator[dict[str, object]]:
  """A record for the trie of so many items, then one for each width of the search."""
  ids = random_ids(items)
  floor, start = resident(), time.perf_counter()
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  trie = build_trie(ids)
  seconds = time.perf_counter() - start
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(trie))
  yield {
    "items": len(ids),
    "build seconds": round(seconds, 2),
    "trie MiB": round(size / 2**20, 1),
    "bytes per item": round(size / len(ids), 1),
    # A peak that an earlier record set says nothing of this one.
    "peak MiB above the IDs": round((peak - floor) / 2**20) if peak > before else None,
    "widest node": list(trie.fanouts),
  }
  tables = jnp.asarray(np.random.default_rng(1).normal(size=(LEVELS, batch, CODES)), jnp.float32)
  for width in widths:
    constrained = jax.jit(functools.partial(search, width=width))
    free = jax.jit(functools.partial(unconstrained, width=width))
    took = milliseconds({"a search": lambda f=constrained: f(trie, tables), "without a trie": lambda f=free: f(tables)})
    yield {"items": len(ids), "beam width": width} | {f"ms {name}": round(value, 3) for name, value in took.items()}


def main(argv: list[str]) -> None:
  """Prints the records of each number of items."""
  del argv
  options = flags.FLAGS
  for items in options.items:
    for record in records(int(items), [int(width) for width in options.beam_width], batch=options.batch):
      print(json.dumps(record), flush=True)


if __name__ == "__main__":
  flags.DEFINE_list("items", ["10000", "1000000", "10000000"], "Numbers of items.")
  flags.DEFINE_integer("batch", 16, "Users at once.")
  flags.DEFINE_list("beam_width", ["20"], "Beams of each user; several are measured one after the other.")
  start(main)
