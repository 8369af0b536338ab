"""Whether memory follows what is distinct: a catalogue larger than memory should be, and users as no other is.

    python experiments/benchmark_scale.py --folder=/tmp/scale --items=1000000

writes one modality of random 768-wide rows (float32, 3 GB for a million), then gives every item its codes with a frozen
tokenizer of the default shape, and repairs collisions with `--repair`. Memory is all that is resident, pages of the
mapped file included, beyond what was before the first block.

    python experiments/benchmark_scale.py --interactions=1000000

takes 2,000 users with 5 of 100,000 items, one of which they all have, through everything that reads histories; then
the same with others among them: one with so many interactions with 1,000 items, one who has had the whole catalogue,
one with one item over and over, and one with a single item to learn from. Prints the peak memory and the seconds of
each path, which the others should hardly raise.
"""

import ctypes
import dataclasses
import functools
import gc
import itertools
import pathlib
import resource
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from bbqrec_jax.command_line import define_path, start
from bbqrec_jax.data.feature_store import FeatureStore
from bbqrec_jax.data.interactions import Interactions, Split, from_lengths, leave_one_out
from bbqrec_jax.data.pipeline import PackedHistories, PrefixHistories
from bbqrec_jax.recommender.catalogue import Catalogue
from bbqrec_jax.recommender.evaluate import evaluate, make_ranker, popularity_metrics
from bbqrec_jax.recommender.items import sampled_similarities
from bbqrec_jax.recommender.settings import RecommenderSettings
from bbqrec_jax.recommender.two_towers import make_recommender
from bbqrec_jax.semantic_ids.repair import collision_rate, reassign_collisions
from bbqrec_jax.semantic_ids.trie import build_trie
from bbqrec_jax.serving.recommend import recommend_all
from bbqrec_jax.tokenizer.inference import InferenceTokenizer, encode_blocks, inference_parameters
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


def measure_items(folder: pathlib.Path, items: int, *, repair: bool) -> None:
  """Writes the features if they are not there, and prints what giving all items their codes takes."""
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f"text_features_{items}.npy"
  if not path.exists():
    write_features(path, items)
  settings = TokenizerSettings(modalities=(("text", WIDTH),), num_items=items)
  row = {"text": np.zeros((1, WIDTH), np.float32)}
  here = {"text": np.ones(1, bool)}
  small = dataclasses.replace(settings, num_items=1)
  example = {"items": np.zeros(1, np.int32), "features": row, "present": here}
  params = jax.jit(Tokenizer(small).init)(jax.random.key(0), example)["params"]
  codebooks = np.asarray(params["codebooks"])
  frozen = InferenceTokenizer(settings, inference_parameters(small, params), codebooks)
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
  if repair:
    start = time.perf_counter()
    repaired = reassign_collisions(codes[-1], latents[-1], codebooks[0])
    print(
      f"collisions {collision_rate(codes[-1]):.1%} before repair, {collision_rate(repaired):.1%} after"
      f" {time.perf_counter() - start:.1f} s; peak memory {(watch.peak - floor) / 2**30:.2f} GiB"
    )


def made_histories(*, users: int, items: int, interactions: int = 0) -> Interactions:
  """Users with five items, the first of which is item 0; others among them where there are `interactions` of one."""
  rng = np.random.default_rng(0)
  histories = list(np.pad(rng.integers(0, items, (users, 4)), ((0, 0), (1, 0))))
  if interactions:
    others = (
      rng.integers(0, min(1000, items), interactions), rng.permutation(items), np.full(1000, 1), np.arange(3),
    )  # fmt: skip
    for place, other in zip(rng.integers(0, users, len(others)), others, strict=True):
      histories.insert(place, other)
  lengths = np.array([len(own) for own in histories])
  return from_lengths(np.concatenate(histories), lengths, np.arange(len(lengths)).astype(str))


def history_paths(
  *, items: int, heads: Iterable[str] = ("dense", "generative"), batch_size: int = 256, max_length: int = 20
) -> dict[str, Callable[[Split], Any]]:
  """What reads histories, by name; each gives what it makes of a split."""
  codes = np.stack(np.unravel_index(np.arange(items), (-(-items // 2**12), 64, 64)), axis=1).astype(np.int32)
  none = np.zeros((items, 0), np.int32)
  paths: dict[str, Callable[[Split], Any]] = {}
  for head in heads:
    levels = {"dense": 0, "generative": codes.shape[1]}[head]
    settings = RecommenderSettings(
      num_items=items, num_levels=levels, num_codes=64, num_columns=0, head=head, width=32, num_layers=1, mlp_width=32,
      max_length=max_length, num_streams=0, seen_item_bias=True, subtree_logits=False,
    )  # fmt: skip
    model, trie = make_recommender(settings), build_trie(codes) if levels else None
    catalogue = Catalogue(
      jnp.asarray(codes if levels else none), jnp.asarray(none), jnp.zeros((items, 0, 1)), jnp.zeros((0, 0)), trie=trie
    )
    row = {name: np.ones((1, max_length), np.int32) for name in ("items", "segments", "positions", "targets")}
    params = jax.jit(model.init)(jax.random.key(0), catalogue, row)["params"]
    ranker = jax.jit(make_ranker(model, beam_width=50))

    def rank(split, *, ranker=ranker, params=params, catalogue=catalogue, **options):
      return evaluate(
        ranker, params, catalogue, split.history("test"), split.test_target, batch_size=batch_size,
        max_length=max_length, num_items=items, **options,
      )  # fmt: skip

    def answer(split, *, model=model, params=params, catalogue=catalogue):
      return list(
        recommend_all(model, params, catalogue, split.history("test"), top=10, beam_width=50, batch_size=batch_size)
      )

    paths[f"{head}: evaluation"] = rank
    paths[f"{head}: evaluation with and without the history"] = functools.partial(rank, without_history=True)
    paths[f"{head}: recommend"] = answer

  def popularity(split):
    return popularity_metrics(split, split.test_target, num_items=items, histories=split.history("test"))

  def buckets(split):
    return sampled_similarities(codes[:, None].astype(np.float32), split.train, ((0, 0),), max_length=20, seed=0)

  def batches(split, dataset):
    return [batch["items"].sum() for batch in itertools.islice(dataset(split.train), 100)]

  packed = functools.partial(
    PackedHistories, batch_rows=batch_size, max_length=max_length, row_length=2 * max_length, whole=False, seed=0
  )
  prefixes = functools.partial(PrefixHistories, batch_rows=batch_size, max_length=max_length, seed=0)
  return paths | {
    "popularity without the history": popularity,
    "similarity buckets": buckets,
    "100 batches, packed": functools.partial(batches, dataset=packed),
    "100 batches of prefixes": functools.partial(batches, dataset=prefixes),
  }


def measure_histories(interactions: int, *, users: int = 2_000, items: int = 100_000) -> None:
  """Prints the peak memory and the seconds of each path, without the users as no other is and with them."""
  splits = [leave_one_out(made_histories(users=users, items=items, interactions=count)) for count in (0, interactions)]
  watch = Watch()
  watch.start()
  print("| path | MiB | seconds | MiB, with others | seconds |\n|---|---|---|---|---|")
  for name, path in history_paths(items=items).items():
    cells = []
    for split in splits:
      path(split)  # Compiles.
      gc.collect()
      ctypes.CDLL(None).malloc_trim(0)  # What was freed would hide what is taken next.
      floor = watch.peak = memory()
      start = time.perf_counter()
      path(split)
      cells += [f"{(watch.peak - floor) / 2**20:,.0f}", f"{time.perf_counter() - start:.1f}"]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main(argv: list[str]) -> None:
  """Measures what is asked for."""
  del argv
  options = flags.FLAGS
  if options.interactions:
    measure_histories(options.interactions)
  if options.folder is not None:
    measure_items(options.folder, options.items, repair=options.repair)


if __name__ == "__main__":
  define_path("folder", "Where the features are written.", check=check_place)
  flags.DEFINE_integer("items", 1_000_000, "Items of the catalogue.")
  flags.DEFINE_bool("repair", False, "Whether to repair collisions too.")
  flags.DEFINE_integer("interactions", 0, "Of one very active user among others.")
  start(main)
