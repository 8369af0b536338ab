"""The trie's benchmark searches what it says it does."""

import jax.numpy as jnp
import numpy as np
import pytest

from bbqrec_jax.semantic_ids.trie import build_trie


@pytest.fixture
def script(load_file, monkeypatch):
  script = load_file("experiments/benchmark_trie.py")
  monkeypatch.setattr(script, "CODES", 3)
  return script


def test_where_every_id_exists_the_trie_finds_what_a_free_search_does(script):
  ids = np.stack(np.unravel_index(np.arange(3**4), (3,) * 4), axis=1).astype(np.int32)
  tables = jnp.asarray(np.random.default_rng(2).normal(size=(4, 5, 3)), jnp.float32)
  items = np.asarray(script.search(build_trie(ids), tables, 7))
  scores = np.asarray(tables - np.log(np.sum(np.exp(tables), axis=-1, keepdims=True)))
  every = sum(scores[level][:, ids[:, level]] for level in range(4))
  assert [set(row) for row in items.tolist()] == [set(row[:7]) for row in np.argsort(-every, axis=1).tolist()]
  # The free search tells the place among the beams of the level before and the code: the last code is the item's.
  assert (np.asarray(script.unconstrained(tables, 7)) % 3 == ids[items][:, :, 3]).all()


def test_each_width_has_a_record(script, monkeypatch):
  monkeypatch.setattr(
    script, "random_ids", lambda items: np.arange(items, dtype=np.int32)[:, None].repeat(4, axis=1) % 3
  )
  about, *rows = script.records(3, [1, 2], batch=2)
  assert (about["items"], about["widest node"]) == (3, [3, 1, 1, 1])
  assert [row["beam width"] for row in rows] == [1, 2]
  assert all(row["ms a search"] > 0 and row["ms without a trie"] > 0 for row in rows)


def test_random_ids_are_distinct(load_file):
  ids = load_file("experiments/benchmark_trie.py").random_ids(5000)
  assert ids.shape == (5000, 4)
  assert len(np.unique(ids, axis=0)) == 5000
  assert 0 <= ids.min() < ids.max() <= 255
