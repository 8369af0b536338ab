"""A bundle of any number of items with random parameters, to measure a server with: `experiments/serving.py`.

    python experiments/synthetic_bundle.py --items=1000000 --output=/tmp/million
    python experiments/serving.py --bundle=/tmp/million --load-only --output=million.json

What it recommends means nothing; that it does so costs what a trained model of this shape costs.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from bbqrec_jax.config import default_config
from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.interactions import from_lengths, leave_one_out
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.recommender.catalogue import Catalogue, code_columns
from bbqrec_jax.recommender.settings import RecommenderSettings
from bbqrec_jax.recommender.two_towers import make_recommender
from bbqrec_jax.runs.restore import Restored
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.semantic_ids.trie import build_trie
from bbqrec_jax.serving.export import write_bundle

LEVELS, CODES = 4, 256


def random_ids(num_items, rng):
  """Distinct IDs [N, L] whose codes are used unevenly, as learned ones are."""
  codes = np.zeros((0, LEVELS), np.int32)
  while len(codes) < num_items:
    drawn = (CODES * rng.random((2 * num_items, LEVELS)) ** 1.5).astype(np.int32)
    codes = np.unique(np.concatenate([codes, drawn]), axis=0)
  return codes[rng.permutation(len(codes))[:num_items]]


def random_run(num_items, *, head, seed=0):
  """A run that was never trained."""
  rng = np.random.default_rng(seed)
  codes = random_ids(num_items, rng)
  settings = RecommenderSettings(
    head=head, num_items=num_items, num_levels=LEVELS, num_codes=CODES, num_columns=LEVELS,
    item_inputs=("fused", "item"), similarity=(),
  )  # fmt: skip
  catalogue = Catalogue(
    semantic_ids=jnp.asarray(codes),
    columns=jnp.asarray(code_columns([codes], [np.ones(num_items, bool)], num_codes=CODES)),
    streams=jnp.zeros((num_items, 0, 1)),
    edges=jnp.zeros((0, 0)),
    trie=build_trie(codes),
  )
  model, grid = make_recommender(settings), np.zeros((1, settings.max_length), np.int32)
  batch = {"items": grid, "segments": grid + 1, "positions": grid}
  batch["targets"] = grid if settings.packed else grid[:, 0]
  shapes = jax.eval_shape(model.init, jax.random.key(0), catalogue, batch)["params"]
  params = jax.tree.map(lambda leaf: (0.1 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)
  ids = SemanticIds(
    streams=("text", "fused"), codes=codes, stream_codes=np.stack([codes, codes]),
    present=np.ones((2, num_items), bool), codebooks=rng.normal(size=(1, LEVELS, CODES, 32)).astype(np.float32),
    data_hash="none", item_ids=ItemIds.numbered(num_items),
  )  # fmt: skip
  dataset = Dataset(
    name=f"{num_items:,} random items", source="synthetic", features={}, present={}, item_ids=ids.item_ids,
    interactions=from_lengths(np.arange(4, dtype=np.int32), np.array([4]), np.array(["0"])),
    titles=tuple(f"{('red', 'green', 'blue')[row % 3]} item {row}" for row in range(num_items)),
  )  # fmt: skip
  return Restored(dataset, ids, model, params, catalogue, default_config(), leave_one_out(dataset.interactions))


def main():
  """Writes the bundle."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--items", type=int, default=1_000_000)
  parser.add_argument("--head", default="generative")
  parser.add_argument("--output", type=pathlib.Path, required=True)
  options = parser.parse_args()
  note, _ = write_bundle(options.output, random_run(options.items, head=options.head), top=50, platforms=["cpu"])
  size = sum(path.stat().st_size for path in options.output.iterdir()) / 2**20
  print(f"{options.output}: {note['num_items']:,} items, {size:.0f} MiB")


if __name__ == "__main__":
  main()
