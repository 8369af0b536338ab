"""An exported recommender gives what the recommender gives, to whoever has JAX and nothing of this package."""

import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.data.interactions import from_lengths
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.errors import InputError
from bbqrec_jax.recommender.catalogue import Catalogue, code_columns
from bbqrec_jax.recommender.settings import DenseTowerSettings, RecommenderSettings
from bbqrec_jax.recommender.two_towers import make_recommender
from bbqrec_jax.semantic_ids.trie import build_trie
from bbqrec_jax.serving.export import export_recommender, load_export, write_export
from bbqrec_jax.serving.recommend import recommend_all
from bbqrec_jax.utils.json_files import read_json, write_json

ITEMS, LEVELS, CODES, LENGTH, TOP = 30, 3, 4, 6, 5
SHAPES = {
  "generative": {"subtree_logits": True},
  "generative, by the history": {"seen_item_bias": True},
  "dense, by the history": {"head": "dense", "seen_item_bias": True},
  "parallel": {"head": "parallel"},
  "dense": {"head": "dense"},
  "dense, by the time": {"head": "dense", "time_buckets": 8, "rows": "packed"},
  "hybrid": {"head": "hybrid", "dense_tower": DenseTowerSettings(width=6, mlp_width=8), "seen_item_bias": True},
  "encoder_decoder": {"backbone": "encoder_decoder", "num_columns": LEVELS, "softmax_over": "all"},
}


def make(random_params, **changes):
  """A recommender, random parameters and a catalogue."""
  rng = np.random.default_rng(0)
  fields = {"num_columns": LEVELS, "width": 8, "num_layers": 1, "num_heads": 2, "mlp_width": 12, "head_width": 4}
  fields |= {"num_items": ITEMS, "num_levels": LEVELS, "num_codes": CODES, "max_length": LENGTH, "depth_layers": 1}
  settings = RecommenderSettings(**(fields | {"subtree_logits": False, "seen_item_bias": False} | changes))
  ids = np.stack(np.unravel_index(rng.choice(CODES**LEVELS, ITEMS, replace=False), (CODES,) * LEVELS), axis=1)
  catalogue = Catalogue(
    semantic_ids=jnp.asarray(ids, jnp.int32),
    columns=jnp.asarray(code_columns([ids], [np.ones(ITEMS, bool)], num_codes=CODES)),
    streams=jnp.zeros((ITEMS, 0, 1)),
    edges=jnp.zeros((0, 0)),
    trie=build_trie(ids),
  )
  model = make_recommender(settings)
  grid = np.zeros((2, LENGTH), np.int32)
  batch = {"items": grid, "segments": grid + 1, "positions": grid, "times": grid, "targets": grid}
  if not settings.packed:
    batch["targets"] = grid[:, 0]
  return model, random_params(model, catalogue, batch), catalogue


def histories(lengths):
  rng = np.random.default_rng(1)
  total = sum(lengths)
  times = np.concatenate([1e9 + np.sort(rng.integers(10**6, size=n)) for n in lengths]).astype(np.float64)
  users = np.array([f"user {row}" for row in range(len(lengths))])
  return from_lengths(rng.integers(ITEMS, size=total), np.array(lengths), users, times)


def padded(rows, width, dtype=np.int32):
  grid = np.full((len(rows), width), -1, dtype)
  for place, row in enumerate(rows):
    grid[place, : len(row)] = row
  return grid


@pytest.mark.parametrize("name", SHAPES)
def test_an_export_recommends_what_the_recommender_does_whatever_the_batch(name, random_params):
  model, params, catalogue = make(random_params, **SHAPES[name])
  function, arrays = export_recommender(model, params, catalogue, top=TOP, beam_width=8, platforms=["cpu"])
  known = histories([3, 1, 9, 6, 2])
  expected = list(recommend_all(model, params, catalogue, known, top=TOP, beam_width=8, batch_size=2))
  assert [user for user, _, _ in expected] == known.users.tolist()
  call = jax.jit(jax.export.deserialize(bytearray(function)).call)
  for users in ([0, 1, 2, 3, 4], [2]):
    rows = [known.history(user) for user in users]
    inputs = [padded([row[-LENGTH:] for row in rows], LENGTH), padded(rows, max(map(len, rows)))]
    if model.settings.time_buckets:
      starts = known.offsets[users]
      seconds = [known.times[s : s + len(row)] - known.times[s] for s, row in zip(starts, rows, strict=True)]
      inputs.append(padded([row[-LENGTH:] for row in seconds], LENGTH))
    items, scores = call(list(arrays.values()), *inputs)
    for row, user in enumerate(users):
      _, expected_items, expected_scores = expected[user]
      assert not set(expected_items.tolist()) & set(rows[row].tolist())
      assert_array_equal(items[row], expected_items)
      assert_allclose(scores[row], expected_scores, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def exported(random_params, tmp_path_factory):
  """A folder as the program writes it."""
  model, params, catalogue = make(random_params)
  folder = tmp_path_factory.mktemp("made") / "export"
  note = write_export(
    folder, model, params, catalogue, top=99, beam_width=8, platforms=["cpu", "tpu"], item_ids=ItemIds.numbered(ITEMS)
  )
  assert (note["top"], note["max_length"], note["inputs"]) == (ITEMS, LENGTH, ["histories", "exclude"])
  assert [path.name for path in folder.parent.iterdir()] == ["export"]
  return folder


def test_the_documented_lines_call_it_without_this_package(exported, tmp_path, snippet):
  code = snippet("serving.md", "serve.py").replace("runs/export", str(exported))
  code += "\nimport json\nprint(json.dumps(items.tolist()))\n"
  code += "import sys\nassert not any(name.startswith(('bbqrec', 'flax')) for name in sys.modules)\n"
  result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stderr
  found = json.loads(result.stdout)
  call = load_export(exported)
  histories = padded([[3, 17, 25], [5]], LENGTH)
  assert found == call(histories, histories)[0].tolist()
  # More are asked for than there are: all that may come back do.
  assert [sorted(row)[-(ITEMS - seen) :] for row, seen in zip(found, (3, 1), strict=True)] == [
    [item for item in range(ITEMS) if item not in (3, 17, 25)], [item for item in range(ITEMS) if item != 5]
  ]  # fmt: skip


def test_without_flatbuffers_one_line_says_what_to_install(exported, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"pip install 'bbqrec_jax\[export\]'"):
    load_export(exported)


def test_a_changed_export_is_refused_in_one_line(exported, tmp_path):
  with pytest.raises(InputError, match=r"export\.json: expected a JSON file, found nothing"):
    load_export(tmp_path)
  for name in ("function.bin", "arrays.npz", "export.json"):
    (tmp_path / name).write_bytes((exported / name).read_bytes())
  (tmp_path / "function.bin").write_bytes(b"no function")
  with pytest.raises(InputError, match=r"function\.bin: expected what `bbqrec export` wrote"):
    load_export(tmp_path)
  note = read_json(exported / "export.json")
  write_json(tmp_path / "export.json", {"arrays": note["arrays"][1:]})
  with pytest.raises(InputError, match=r"arrays\.npz: expected the arrays that export\.json names"):
    load_export(tmp_path)
