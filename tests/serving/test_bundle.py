"""A bundle answers what the live model does, without any of the training code, and a damaged one does not load."""

import importlib.util
import json
import shutil
import subprocess
import sys
import unittest.mock

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.interactions import from_lengths
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.errors import InputError
from bbqrec_jax.layers.apply import apply
from bbqrec_jax.ops.candidate_similarity import tail_edges, unit_rows
from bbqrec_jax.recommender.catalogue import CandidateStreams, Catalogue, code_columns
from bbqrec_jax.recommender.settings import CandidateSimilaritySettings, DenseTowerSettings, RecommenderSettings
from bbqrec_jax.recommender.signals import build_sources, no_network
from bbqrec_jax.recommender.two_towers import make_recommender
from bbqrec_jax.runs.restore import Restored
from bbqrec_jax.semantic_ids.trie import build_trie
from bbqrec_jax.serving.attributes import Attributes
from bbqrec_jax.serving.bundle import Answer, Bundle, Query, file_digest, same
from bbqrec_jax.serving.export import compare_with_live, export_recommender, read_attributes, write_bundle
from bbqrec_jax.serving.precompute import precompute
from bbqrec_jax.serving.recommend import recommend_all
from bbqrec_jax.utils.json_files import read_json, write_json

pytestmark = pytest.mark.usefixtures("compile_cache")

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


COMPARED = {
  "candidate_similarity": CandidateSimilaritySettings(("features", "behaviour"), last_items=3, num_buckets=4),
  "candidate_vectors": 1,
}


def candidates():
  """What candidates are compared by: vectors, which every fourth item lacks, and neighbours."""
  rng = np.random.default_rng(3)
  vectors = rng.normal(size=(ITEMS, 5)).astype(np.float32)
  vectors[::4] = 0
  return CandidateStreams(
    vectors=(jnp.asarray(unit_rows(vectors)),),
    edges=jnp.asarray(tail_edges(vectors, 4, seed=0))[None],
    neighbours=jnp.asarray([rng.choice(ITEMS, 6, replace=False) for _ in range(ITEMS)], jnp.int32),
    buckets=jnp.asarray(rng.integers(0, 4, (ITEMS, 6)), jnp.int32),
    signals=build_sources(histories([9] * 20), num_items=ITEMS, count=4),
  )


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
    candidates=candidates() if settings.candidate_similarity.streams else None,
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


def restored_run(random_params, **changes):
  """A run as `restore` gives it, with random parameters."""
  model, params, catalogue = make(random_params, **changes)
  dataset = Dataset(
    name="made", source="memory", interactions=histories([3, 1, 9, 6, 2, 9]),
    features={"text": np.zeros((ITEMS, 2))}, present={},
    item_ids=ItemIds([f"SKU-{row}" for row in range(ITEMS)]), titles=tuple(f"title {row}" for row in range(ITEMS)),
  )  # fmt: skip
  config = ml_collections.ConfigDict({"evaluation": {"beam_width": 8, "batch_size": 4}})
  return Restored(dataset, None, model, params, catalogue, config, split=None)


@pytest.fixture(scope="module")
def run(random_params):
  return restored_run(random_params, head="dense", seen_item_bias=True)


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
  """A folder as the program writes it; the bundle and the live model were asked about every user."""
  folder = tmp_path_factory.mktemp("made") / "bundle"
  note, compared = write_bundle(
    folder, run, top=TOP, platforms=["cpu"], batch_sizes=[1, 4], widths=[16], about={"test": {"mrr": 0.5}}, users=9
  )
  assert note["limits"] == {"max_length": LENGTH, "top": TOP, "batch_sizes": [1, 4], "widths": [16]}
  assert (note["test"], note["streams"], note["inputs"]) == ({"mrr": 0.5}, ["items"], ["histories", "exclude"])
  assert (compared.users, compared.identical, compared.equal) == (6, 6, 0)
  assert [path.name for path in folder.parent.iterdir()] == ["bundle"]
  return folder


@pytest.fixture(scope="module")
def bundle(made):
  return Bundle(made)


def test_whoever_may_read_one_file_of_a_bundle_may_read_all(made):
  assert len({path.stat().st_mode for path in made.iterdir()}) == 1


def test_a_list_in_another_order_is_counted_beside_the_identical_ones(run, monkeypatch):
  scores = np.array([-1.0, -1.0, -2.0])
  live = [Answer(np.array([4, 5, 6]), scores)] * 6
  bundle = unittest.mock.Mock(limits={"top": 3})
  bundle.answer.return_value = [*live[:4], Answer(np.array([5, 4, 6]), scores), Answer(np.array([4, 6, 5]), scores)]
  monkeypatch.setattr("bbqrec_jax.serving.export._live", lambda *_, **__: live)
  assert compare_with_live(bundle, run, users=6) == (6, 4, 1, 0.0)


def test_what_follows_from_the_arrays_alone_is_computed_once():
  rng = np.random.default_rng(0)
  arrays = {"table": rng.normal(size=(7, 3)).astype(np.float32), "map": rng.normal(size=(3, 2)).astype(np.float32)}

  def function(held, rows):
    table, weights = held
    # A range of numbers enters it, too, which no array does.
    vectors = jnp.tanh((table - jnp.arange(3, dtype=jnp.float32)[None] * 0.1) @ weights)
    return vectors[rows] @ vectors.T + jnp.arange(7, dtype=jnp.float32)[None], table[rows]

  (rows,) = jax.export.symbolic_shape("b")
  rest, needed = precompute(function, arrays, jax.ShapeDtypeStruct((rows,), jnp.int32))
  assert "map" not in needed, "nothing reads it any more"
  assert_array_equal(needed["table"], arrays["table"])
  assert {(7, 2)} <= {value.shape for name, value in needed.items() if name.startswith("computed/")}
  exported = jax.export.export(jax.jit(rest))(list(needed.values()), jax.ShapeDtypeStruct((rows,), jnp.int32))
  assert "tanh" not in exported.mlir_module()
  asked = np.array([3, 0, 3], np.int32)
  found = exported.call(list(needed.values()), asked)
  for own, expected in zip(found, function(list(arrays.values()), asked), strict=True):
    assert_allclose(own, expected, rtol=1e-5)


def test_a_bundle_is_read_without_the_training_code(made, tmp_path):
  code = f"""
import pathlib, sys, numpy as np
from bbqrec_jax.serving.bundle import Bundle, Query
bundle = Bundle(pathlib.Path({str(made)!r}))
(answer,) = bundle.answer([Query(np.array([3, 4]), np.array([3, 4]))])
assert len(answer.items) == {TOP}
wrong = [name for name in sys.modules if name.startswith(("flax", "optax", "orbax", "grain", "tensorflow"))]
wrong += [name for name in sys.modules if name.startswith(("bbqrec_jax.recommender", "bbqrec_jax.tokenizer"))]
assert not wrong, wrong
"""
  result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stderr


def test_the_documented_lines_call_it_without_this_package(made, bundle, tmp_path, snippet):
  code = snippet("serving.md", "serve.py").replace("runs/bundle", str(made)).replace("[[3, 17, 25], [5]]", "HISTORIES")
  code = 'HISTORIES = [["SKU-3", "SKU-17", "SKU-25"], ["SKU-5"]]\n' + code
  code += "\nimport json\nprint(json.dumps(items.tolist()))\n"
  code += "import sys\nassert not any(name.startswith(('bbqrec', 'flax')) for name in sys.modules)\n"
  result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stderr
  asked = [Query(np.array(own), np.array(own)) for own in ([3, 17, 25], [5])]
  assert json.loads(result.stdout) == [answer.items.tolist() for answer in bundle.answer(asked)]


def live(run, query, top):
  """All items that may come back, by the live model."""
  one = from_lengths(query.history, np.array([len(query.history)]), np.array(["u"]))
  ((_, items, scores),) = recommend_all(
    run.model, run.params, run.catalogue, one, top=ITEMS, beam_width=ITEMS, repeat=True, exclude=query.exclude
  )
  kept = np.ones(len(items), bool) if query.allow is None else np.isin(items, query.allow)
  return Answer(items[kept][:top], scores[kept][:top])


def test_whatever_is_left_out_or_allowed_the_answer_is_that_of_the_live_model(run, bundle):
  rng = np.random.default_rng(2)
  queries = [
    Query(rng.integers(ITEMS, size=rng.integers(1, 12)), rng.integers(ITEMS, size=count), allow)
    for count in (1, 5, 16, 25)
    for allow in (None, rng.choice(ITEMS, 7, replace=False), np.array([4]), np.arange(ITEMS))
  ]
  for query, answer in zip(queries, bundle.answer(queries), strict=True):
    expected = live(run, query, TOP)
    assert_array_equal(answer.items, expected.items)
    assert_allclose(answer.scores, expected.scores, rtol=1e-4, atol=1e-5)


def test_nothing_is_compiled_for_a_request(bundle):
  programs = dict(bundle._programs)
  assert set(programs) == {(1, 16), (4, 16), (1, ITEMS)}
  with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax.stages.Lowered, "compile", lambda *_, **__: pytest.fail("compiled for a request"))
    for count in (1, 2, 3, 4, 5, 9):
      assert len(bundle.answer([Query(np.array([1, 2]), np.array([1, 2]))] * count)) == count


def test_similar_items_and_reasons_are_by_cosine(run, bundle):
  vectors = np.asarray(apply(run.model, run.params, "item_vectors", run.catalogue))
  vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
  found = bundle.similar(4, count=6)
  cosines = vectors @ vectors[4]
  cosines[4] = -np.inf
  assert_array_equal(found.items, np.argsort(-cosines)[:6])
  assert_allclose(found.scores, np.sort(cosines)[::-1][:6], rtol=1e-5)
  assert len(bundle.similar(4, count=99).items) == ITEMS - 1
  ((reasons,),) = bundle.reasons([np.array([7, 9, 7, 2])], [np.array([3])], count=2)
  own = {item: vectors[3] @ vectors[item] for item in (7, 9, 2)}
  best = [item for item in sorted(own, key=own.get, reverse=True)[:2] if own[item] > 0]
  assert [(one.item, one.stream, one.added) for one in reasons] == [(item, "items", None) for item in best]
  assert_allclose([one.similarity for one in reasons], [own[item] for item in best], rtol=1e-5)


@pytest.fixture(scope="module")
def compared(random_params, tmp_path_factory):
  """A run with time buckets and candidate similarity, and its bundle."""
  run = restored_run(random_params, head="dense", time_buckets=8, rows="packed", **COMPARED)
  folder = tmp_path_factory.mktemp("compared") / "bundle"
  write_bundle(
    folder, run, top=TOP, platforms=["cpu"], batch_sizes=[4], widths=[16], attributes={"price": [1.0] * ITEMS}
  )
  return run, Bundle(folder)


def test_times_are_read_where_the_model_has_buckets(compared):
  run, bundle = compared
  assert compare_with_live(bundle, run, users=6)[1:3] == (6, 0)
  with pytest.raises(InputError, match=r"give that of each"):
    bundle.answer([Query(np.array([1]), np.array([1]))])
  with pytest.raises(InputError, match=r"at least one item"):
    bundle.answer([Query(np.zeros(0, int), np.array([1]))])
  assert bundle.attributes.names == ("price",)


def test_a_bundle_of_large_batches_alone_answers_one_that_allows_few(compared):
  _, bundle = compared
  asked = Query(np.array([1]), np.array([1]), allow=np.array([2, 5]), times=np.zeros(1))
  first, second = bundle.answer([asked, asked._replace(allow=None)])
  assert sorted(first.items) == [2, 5]
  order = [item for item in second.items.tolist() if item in (2, 5)]
  assert order == [item for item in first.items.tolist() if item in order]


def test_what_a_reason_adds_is_what_the_score_lacks_without_it(compared):
  run, bundle = compared
  history, items = np.array([28, 3, 9, 3, 17, 9, 2, 0]), np.arange(ITEMS)
  recent = [0, 2, 9]  # The last distinct ones, the latest first.
  grid = history[None, -LENGTH:].astype(np.int32)
  batch = {
    "items": grid,
    "segments": grid * 0 + 1,
    "positions": np.arange(LENGTH, dtype=np.int32)[None],
    "times": grid * 0,
  }

  @jax.jit
  def of_params(params):
    states = apply(run.model, params, "last_states", run.catalogue, batch)
    return apply(run.model, params, "scores", run.catalogue, states, run.model.seen(batch))[0]

  plain = run.params["candidate_similarity"] | no_network(16)  # Which is no sum of addends.

  def scores(**tables):
    return np.asarray(of_params(run.params | {"candidate_similarity": plain | tables}))

  learned, whole = run.params["candidate_similarity"], scores()
  lacking = np.zeros((2, len(recent), ITEMS))
  for stream, name in enumerate(("tables", "neighbour_table")):
    for place in range(len(recent)):
      without = np.array(learned[name])
      if stream == 0:  # As if it had nothing in common with any item.
        without[0, place] = without[0, place, 0]
      else:
        without[place] = 0
      lacking[stream, place] = whole - scores(**{name: without})
  streams, kinds = ("features of text", "behaviour"), set()
  (every,) = bundle.reasons([history], [items], count=9)
  for item, reasons in enumerate(every):
    best = lacking[:, :, item].max(axis=0)
    order = [place for place in np.argsort(-best) if best[place] > 1e-5]
    assert [one.item for one in reasons] == [recent[place] for place in order]
    assert [one.stream for one in reasons] == [streams[lacking[:, place, item].argmax()] for place in order]
    assert_allclose([one.added for one in reasons], best[order], atol=1e-5)
    kinds |= {one.bucket if isinstance(one.bucket, str) else one.stream for one in reasons}
  assert {"missing", *streams} <= kinds, "every kind of reason was seen"
  # With others, whose histories and lists are of other lengths, as by itself.
  other = np.array([4, 1])
  for one, own, count in ((history, items, 9), (other, items[3:4], 9), (other, items[:0], 0)):
    beside = bundle.reasons([other, one, history], [items[:7], own, items], count=9)[1]
    assert beside == bundle.reasons([one], [own], count=9)[0]
    (asked,) = bundle.answer([Query(one, one, times=np.zeros(len(one)), top=2, reasons=count)])
    found = bundle.reasons([one], [asked.items], count=9)[0]
    assert [list(why) for why in asked.reasons] == ([why[:count] for why in found] if count else [])
    assert len(asked.items) == 2


def test_attributes_are_those_of_the_files_and_filter_as_numpy_does(tmp_path):
  rng = np.random.default_rng(0)
  brands, levels = ["Acme", "ACME ", "Bolt & Co", ""], ["Tools", "Hand tools", "Saws"]
  lines = [
    {
      "id": f"SKU-{row}", "brand": brands[rng.integers(4)], "category": " > ".join(levels[: rng.integers(4)]),
      "price": [None, float(rng.integers(100)), "dear"][rng.integers(3)], "title": "x",
    }
    for row in range(40)
  ]  # fmt: skip
  (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
  ids = ItemIds([f"SKU-{row}" for row in range(39, 4, -1)])  # Others were left out.
  columns = read_attributes([tmp_path, tmp_path / "none"], ids)
  attributes = Attributes(json.loads(json.dumps(columns)), num_items=len(ids))
  kept = lines[:4:-1]
  brand = np.array([one["brand"].strip().lower() for one in kept])
  category = np.array([one["category"] for one in kept])
  price = np.array([one["price"] if isinstance(one["price"], float) else np.nan for one in kept])
  assert_array_equal(attributes.matching({"brand": ["acme"]}), np.flatnonzero(brand == "acme"))
  wanted = np.isin(brand, ["acme", "bolt & co"]) & (np.char.find(category, "Hand tools") >= 0)
  found = attributes.matching({"brand": ["Bolt & Co", "ACME"], "category": ["hand TOOLS"]}, highest=60)
  assert_array_equal(found, np.flatnonzero(wanted & (price <= 60)))
  assert_array_equal(attributes.matching({}, lowest=20, highest=60), np.flatnonzero((price >= 20) & (price <= 60)))
  assert len(attributes.matching({"category": ["Spoons"]})) == 0
  assert attributes.about()["price"] == [np.nanmin(price), np.nanmax(price)]
  assert attributes.about()["category"] == levels, "the most frequent first"
  assert read_attributes([tmp_path / "none"], ids) == {}
  with pytest.raises(InputError, match=r"filters\.price: expected an attribute"):
    Attributes({"brand": brands}, num_items=4).matching({}, lowest=1)


def test_lists_are_the_same_but_for_near_ties():
  one = Answer(np.array([4, 2, 9]), np.array([-1.0, -2.0, -3.0]))
  assert same(one, one)
  assert same(Answer(one.items, one.scores + 1e-5), one)
  assert not same(Answer(np.array([2, 4, 9]), one.scores), one)
  assert not same(Answer(one.items[:2], one.scores[:2]), one)
  assert not same(Answer(one.items, one.scores + 0.1), one)
  tied = Answer(np.array([4, 2, 9]), np.array([-1.0, -1.0, -3.0]))
  assert same(Answer(np.array([2, 4, 9]), tied.scores), tied)


def test_without_safetensors_one_line_says_what_to_install(made, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "safetensors" else name)
  with pytest.raises(InputError, match=r"pip install 'bbqrec_jax\[export\]'"):
    Bundle(made)


def test_a_damaged_bundle_is_refused_in_one_line(made, tmp_path):
  with pytest.raises(InputError, match=r"bundle\.json: expected a JSON file, found nothing"):
    Bundle(tmp_path)

  def changed(name, content, *, noted=False):
    folder = tmp_path / f"{name} {noted}"
    shutil.copytree(made, folder)
    (folder / name).write_bytes(content)
    if noted:  # Whoever changes a file can change what is said of it.
      note = read_json(folder / "bundle.json")
      note["files"][name] = file_digest(folder / name)
      write_json(folder / "bundle.json", note)
    return folder

  for name in ("recommend.bin", "weights.safetensors", "items.json"):
    with pytest.raises(InputError, match=rf"{name}: expected the file that bundle\.json names"):
      Bundle(changed(name, b"no function"))
  with pytest.raises(InputError, match=r"made with JAX .* cannot use it"):
    Bundle(changed("recommend.bin", b"no function", noted=True))
  with pytest.raises(InputError, match=r"bundle\.json: expected a JSON file"):
    Bundle(changed("bundle.json", b"{}"))
  queries = read_json(made / "check.json")["queries"]
  queries[0]["items"].reverse()
  folder = changed("check.json", b"", noted=False)
  write_json(folder / "check.json", {"queries": queries})
  folder = changed("check.json", (folder / "check.json").read_bytes(), noted=True)
  with pytest.raises(InputError, match=r"check\.json query 0: expected the items"):
    Bundle(folder)
