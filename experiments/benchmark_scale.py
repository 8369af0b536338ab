"""A catalogue larger than memory should be: quantizes memory-mapped features in blocks and reports the peak memory.

    python experiments/benchmark_scale.py --folder=/tmp/scale --items=1000000

writes one modality of random 768-wide rows (float32, 3 GB for a million), then gives every item its codes with a frozen
tokenizer of the default shape, and repairs collisions with `--repair`. Memory is all that is resident, pages of the
mapped file included, beyond what was before the first block.
"""

import dataclasses
import pathlib
import resource
import threading
import time

import jax
import numpy as np
from absl import flags

from bbqrec_jax.command_line import define_path, start
from bbqrec_jax.data.feature_store import FeatureStore
from bbqrec_jax.semantic_ids.repair import collision_rate, reassign_collisions
from bbqrec_jax.tokenizer.frozen import FrozenTokenizer, encode_blocks, frozen_parameters
from bbqrec_jax.tokenizer.model import Tokenizer
from bbqrec_jax.tokenizer.settings import TokenizerSettings
from bbqrec_jax.utils.files import check_place

WIDTH = 768


def memory() -> int:
  """Resident memory of this process in bytes (Linux)."""
  pages = int(pathlib.Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
  return pages * resource.getpagesize()


class Watch(threading.Thread):
  """Keeps the largest value seen."""

  def __init__(self):
    super().__init__(daemon=True)
    self.peak = 0

  def run(self):
    """Looks a hundred times a second."""
    while True:
      self.peak = max(self.peak, memory())
      time.sleep(0.01)


def write_features(path: pathlib.Path, items: int) -> None:
  """Rows around 10,000 centres, so that some items are near one another."""
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(10_000, WIDTH)).astype(np.float32)
  out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(items, WIDTH))
  for first in range(0, items, 10_000):
    rows = min(10_000, items - first)
    noise = rng.standard_normal((rows, WIDTH), np.float32)
    out[first : first + rows] = centres[rng.integers(0, len(centres), rows)] + 0.5 * noise
  out.flush()


def main(argv: list[str]) -> None:
  """Writes the features if they are not there, and measures."""
  del argv
  options = flags.FLAGS
  folder, items = options.folder, options.items
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f"text_features_{items}.npy"
  if not path.exists():
    write_features(path, items)
  settings = TokenizerSettings((("text", WIDTH),), items)
  row = {"text": np.zeros((1, WIDTH), np.float32)}
  here = {"text": np.ones(1, bool)}
  small = dataclasses.replace(settings, num_items=1)
  example = {"items": np.zeros(1, np.int32), "features": row, "present": here}
  params = jax.jit(Tokenizer(small).init)(jax.random.key(0), example)["params"]
  codebooks = np.asarray(params["codebooks"])
  frozen = FrozenTokenizer(settings, frozen_parameters(small, params), codebooks)
  statistics = {"mean/text": np.zeros(WIDTH, np.float32), "deviation/text": np.ones(WIDTH, np.float32)}

  def encode_all(count):
    features = {"text": np.load(path, mmap_mode="r", allow_pickle=False)[:count]}
    store = FeatureStore(features, {"text": np.ones(count, bool)}, statistics)
    return encode_blocks(lambda block: frozen(*store.rows(block)), count, block=2048)

  encode_all(2048)  # Compiles; what is held from here on is of the items.
  floor = memory()
  watch = Watch()
  watch.start()
  start = time.perf_counter()
  latents, _, codes = encode_all(items)
  seconds = time.perf_counter() - start
  print(f"{items:,} items in {seconds:.1f} s, {items / seconds:,.0f} a second")
  print(f"peak memory {(watch.peak - floor) / 2**30:.2f} GiB above the floor of {floor / 2**30:.2f} GiB")
  if options.repair:
    start = time.perf_counter()
    repaired = reassign_collisions(codes[-1], latents[-1], codebooks[0])
    print(
      f"collisions {collision_rate(codes[-1]):.1%} before repair, {collision_rate(repaired):.1%} after"
      f" {time.perf_counter() - start:.1f} s; peak memory {(watch.peak - floor) / 2**30:.2f} GiB"
    )


if __name__ == "__main__":
  define_path("folder", "Where the features are written.", check=check_place)
  flags.DEFINE_integer("items", 1_000_000, "Items of the catalogue.")
  flags.DEFINE_bool("repair", False, "Whether to repair collisions too.")
  flags.mark_flags_as_required(["folder"])
  start(main)
