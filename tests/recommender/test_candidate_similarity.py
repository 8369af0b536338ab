"""Candidate similarity: nothing while its tables are zero, and what it adds when they are not; how they are fitted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.data.interactions import from_lengths
from bbqrec_jax.ops.candidate_similarity import tail_edges, unit_rows
from bbqrec_jax.recommender import fit_similarity as fitting
from bbqrec_jax.recommender.candidate_similarity import CandidateSimilarity, build_streams
from bbqrec_jax.recommender.catalogue import CandidateStreams, Catalogue, code_columns
from bbqrec_jax.recommender.evaluate import make_ranker
from bbqrec_jax.recommender.fit_similarity import fit_similarity
from bbqrec_jax.recommender.settings import CandidateSimilaritySettings, DenseTowerSettings, RecommenderSettings
from bbqrec_jax.recommender.signals import SIGNALS, build_sources, is_fitted, network, network_shapes, no_network
from bbqrec_jax.recommender.two_towers import make_recommender
from bbqrec_jax.semantic_ids.trie import build_trie
from bbqrec_jax.training.partitioning import SingleDevice

ITEMS, LEVELS, CODES, LENGTH, BUCKETS = 40, 2, 8, 6, 4
COMPARE = CandidateSimilaritySettings(
  streams=("features", "behaviour"), last_items=3, num_buckets=BUCKETS, passes=20, batch_rows=16
)
SETTINGS = RecommenderSettings(
  num_items=ITEMS, num_levels=LEVELS, num_codes=CODES, num_columns=LEVELS, width=8, num_layers=1, mlp_width=8,
  depth_layers=1, max_length=LENGTH, dense_tower=DenseTowerSettings(width=8, mlp_width=8), candidate_vectors=1,
  candidate_similarity=COMPARE, rows="histories",
)  # fmt: skip
HEADS = ["dense", "parallel", "generative", "hybrid"]


@pytest.fixture(scope="module")
def catalogue():
  rng = np.random.default_rng(0)
  ids = np.stack(np.unravel_index(rng.choice(CODES**LEVELS, ITEMS, replace=False), (CODES,) * LEVELS), axis=1)
  vectors = rng.normal(size=(ITEMS, 5)).astype(np.float32)
  return Catalogue(
    semantic_ids=jnp.asarray(ids, jnp.int32),
    columns=jnp.asarray(code_columns([ids], [np.ones(ITEMS, bool)], num_codes=CODES)),
    streams=jnp.zeros((ITEMS, 0, 1)),
    edges=jnp.zeros((0, 0)),
    trie=build_trie(ids),
    candidates=CandidateStreams(
      vectors=(jnp.asarray(unit_rows(vectors)),),
      edges=jnp.asarray(tail_edges(vectors, BUCKETS, seed=0))[None],
      neighbours=jnp.asarray(rng.integers(0, ITEMS, (ITEMS, 2)), jnp.int32),
      buckets=jnp.asarray(rng.integers(0, BUCKETS, (ITEMS, 2)), jnp.int32),
      signals=build_sources(
        from_lengths(rng.integers(0, ITEMS, 200), np.full(40, 5), np.arange(40).astype(str)), num_items=ITEMS, count=4
      ),
    ),
  )


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(1)
  lengths = np.array([6, 3, 1, 5])
  place = np.tile(np.arange(LENGTH), (4, 1))
  real = place < lengths[:, None]
  return {
    "items": np.where(real, rng.integers(0, ITEMS, (4, LENGTH)), 0).astype(np.int32),
    "segments": real.astype(np.int32),
    "positions": np.where(real, place, 0).astype(np.int32),
    "targets": rng.integers(0, ITEMS, 4).astype(np.int32),
  }


def of_head(random_params, catalogue, batch, head):
  """The model, its parameters with tables of zeros, and the plain model of the same parameters."""
  model = make_recommender(dataclasses.replace(SETTINGS, head=head))
  plain = make_recommender(dataclasses.replace(SETTINGS, head=head, candidate_similarity=CandidateSimilaritySettings()))
  params = random_params(model, catalogue, batch)
  base = {name: part for name, part in params.items() if name != "candidate_similarity"}
  tables = jax.tree.map(jnp.zeros_like, params["candidate_similarity"])
  return model, base | {"candidate_similarity": tables | {"scale": jnp.ones_like(tables["scale"])}}, plain, base


@functools.partial(jax.jit, static_argnames=("model", "method", "width", "deterministic"))
def call(model, params, method, *args, **more):
  return model.apply({"params": params}, *args, method=method, **more)


def found(model, params, catalogue, batch, width=8):
  states = call(model, params, "last_states", catalogue, batch)
  return call(model, params, "search", catalogue, states, width=width, seen=model.seen(batch))


@pytest.mark.parametrize("head", HEADS)
def test_zero_tables_leave_the_model_as_it_is_bit_for_bit(random_params, catalogue, batch, head):
  model, params, plain, base = of_head(random_params, catalogue, batch, head)
  one, other = found(model, params, catalogue, batch), found(plain, base, catalogue, batch)
  assert_array_equal(one.items, other.items)
  assert_array_equal(one.log_probs, other.log_probs)
  ranks = jax.jit(make_ranker(model, beam_width=8))(params, catalogue, batch)
  expected = jax.jit(make_ranker(plain, beam_width=8))(base, catalogue, batch)
  jax.tree.map(assert_array_equal, ranks, expected)


@pytest.mark.parametrize("head", HEADS)
def test_one_call_ranks_with_the_history_and_without_it(random_params, catalogue, batch, head):
  model, params, _, _ = of_head(random_params, catalogue, batch, head)
  rng = np.random.default_rng(4)
  tables = rng.normal(size=(1, 3, BUCKETS + 2)).astype(np.float32)
  params["candidate_similarity"] |= {"tables": tables}
  own = np.where(batch["segments"] > 0, batch["items"], -1)
  both = jax.jit(make_ranker(model, beam_width=8))(params, catalogue, batch | {"exclude": own})
  for name, exclude in (("", None), ("_without_history", own)):
    states = call(model, params, "last_states", catalogue, batch)
    beam = call(model, params, "search", catalogue, states, width=8, exclude=exclude, seen=model.seen(batch))
    assert_array_equal(both[f"top{name}"][:, :8], beam.items[:, :8])
  left = np.asarray(both["top_without_history"])
  assert not any(set(one[one >= 0].tolist()) & set(had.tolist()) for one, had in zip(left, own, strict=True))


@pytest.mark.parametrize("head", HEADS)
def test_what_is_like_the_last_item_comes_to_the_front(random_params, catalogue, batch, head):
  model, params, _, _ = of_head(random_params, catalogue, batch, head)
  tables = np.zeros((1, 3, BUCKETS + 2), np.float32)
  tables[0, 0, BUCKETS - 1] = 100.0  # Of the last item's nearest.
  params["candidate_similarity"]["tables"] = tables
  unit, edges = catalogue.candidates.vectors[0], catalogue.candidates.edges[0]
  result = found(model, params, catalogue, batch)
  last = batch["items"][np.arange(4), batch["segments"].sum(1) - 1]
  for row, own in enumerate(last):
    near = set(np.flatnonzero(unit @ unit[own] > edges[-1]).tolist()) - {int(own)}
    assert set(result.items[row, : len(near)].tolist()) == near
  assert sum(len(set(np.flatnonzero(unit @ unit[own] > edges[-1]).tolist())) > 1 for own in last) > 0


@pytest.mark.parametrize("with_network", [False, True])
def test_scores_of_all_are_scale_times_base_plus_what_is_added(random_params, catalogue, batch, with_network):
  model, _, plain, base = of_head(random_params, catalogue, batch, "dense")
  rng = np.random.default_rng(2)
  tables = {"scale": jnp.array([0.5]), "tables": rng.normal(size=(1, 3, BUCKETS + 2)).astype(np.float32)}
  tables["neighbour_table"] = rng.normal(size=(3, BUCKETS)).astype(np.float32)
  tables |= no_network(COMPARE.network_units)
  if with_network:
    tables |= {
      name: rng.normal(size=shape).astype(np.float32) for name, shape in network_shapes(COMPARE.network_units).items()
    }
  states, seen = call(plain, base, "last_states", catalogue, batch), model.seen(batch)
  scores = call(model, base | {"candidate_similarity": tables}, "scores", catalogue, states, seen)
  added = call(model, base | {"candidate_similarity": tables}, "similarity_scores", catalogue, seen)
  of_base = call(plain, base, "scores", catalogue, states, seen)
  expected = 0.5 * of_base + added
  if with_network:
    every = jnp.tile(jnp.arange(ITEMS, dtype=jnp.int32), (4, 1))
    values = CandidateSimilarity(model.settings).apply(
      {"params": tables}, catalogue.candidates, seen, jax.nn.log_softmax(of_base), added, every, method="signals"
    )
    expected = expected + network(tables, values)
    assert np.std(scores - 0.5 * of_base - added) > 0.1
  assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


def test_the_loss_of_the_base_teaches_the_tables_nothing(random_params, catalogue, batch):
  model, params, plain, base = of_head(random_params, catalogue, batch, "hybrid")
  loss, gradient = jax.value_and_grad(lambda p: call(model, p, "loss", catalogue, batch, deterministic=True)[0])(params)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["candidate_similarity"]))
  assert_array_equal(loss, call(plain, base, "loss", catalogue, batch, deterministic=True)[0])


@pytest.mark.parametrize("head", ["dense", "generative", "hybrid"])
def test_fitting_finds_that_near_items_follow_one_another(random_params, catalogue, batch, head, monkeypatch):
  monkeypatch.setattr(fitting, "_FEWEST_USERS", 80)
  model, params, _, _ = of_head(random_params, catalogue, batch, head)
  unit = np.asarray(catalogue.candidates.vectors[0])
  rng = np.random.default_rng(3)
  histories = from_lengths(rng.integers(0, ITEMS, 80 * 3), np.full(80, 3), np.arange(80).astype(str))
  last = histories.items[2::3]
  cosines = unit[last] @ unit.T
  cosines[np.arange(80), last] = -1
  targets = np.argmax(cosines, axis=1).astype(np.int32)
  options = {"users": np.arange(80), "seed": 0, "batch_size": 16, "max_length": LENGTH, "bounds": ()}
  options["partitioner"] = SingleDevice()
  fitted, losses = fit_similarity(params, model, catalogue, catalogue, histories, targets, **options)
  assert losses["with_network"] < losses["last_pass"] < losses["first_pass"]
  for place in range(1, fitted["tables"].shape[1]):  # One curve, times a weight of each place.
    weight = fitted["tables"][0, place, BUCKETS - 1] / fitted["tables"][0, 0, BUCKETS - 1]
    np.testing.assert_allclose(fitted["tables"][0, place], weight * fitted["tables"][0, 0], rtol=1e-4, atol=1e-6)
  row = fitted["tables"][0, 0]  # Of the last item: its nearest far above all others, itself among these.
  assert row[BUCKETS - 1] > max(row[: BUCKETS - 1].max(), row[BUCKETS]) + 0.5
  again, _ = fit_similarity(params, model, catalogue, catalogue, histories, targets, **options)
  jax.tree.map(assert_array_equal, fitted, again)
  assert is_fitted(fitted)
  assert fitted["signal_scale"][SIGNALS.index("popularity")] > 0
  popularity = catalogue.candidates.signals.popularity
  alike = dataclasses.replace(catalogue.candidates.signals, popularity=jnp.ones_like(popularity))
  alike = dataclasses.replace(catalogue, candidates=dataclasses.replace(catalogue.candidates, signals=alike))
  none, _ = fit_similarity(params, model, alike, alike, histories, targets, **options)
  assert none["signal_scale"][SIGNALS.index("popularity")] == 0, "what all items share is not read"
  few, losses = fit_similarity(
    params, model, catalogue, catalogue, histories, targets, **options | {"users": np.arange(79)}
  )
  assert not is_fitted(few), "the network would learn so few by heart"
  assert losses.keys() == {"first_pass", "last_pass"}
  assert few.keys() == fitted.keys()
  before, after = (
    jax.jit(make_ranker(model, beam_width=8))(
      params | {"candidate_similarity": tables},
      catalogue,
      {
        "items": np.pad(histories.items.reshape(80, 3), ((0, 0), (0, 3))),
        "segments": np.pad(np.ones((80, 3), np.int32), ((0, 0), (0, 3))),
        "positions": np.tile([0, 1, 2, 0, 0, 0], (80, 1)).astype(np.int32),
        "targets": targets,
      },
    )["ranks"]
    for tables in (params["candidate_similarity"], fitted)
  )
  first = [np.mean(np.asarray(ranks) == 0) for ranks in (before, after)]
  assert first[1] > first[0] + 0.2


def test_streams_are_what_the_settings_name():
  rng = np.random.default_rng(0)
  histories = from_lengths(rng.integers(0, 20, 40), np.full(10, 4), np.arange(10).astype(str))
  features = {"text": rng.normal(size=(ITEMS, 3)), "image": rng.normal(size=(ITEMS, 2))}
  made = build_streams(COMPARE, None, features, histories, num_items=ITEMS, seed=0)
  assert [rows.shape for rows in made.vectors] == [(ITEMS, 3), (ITEMS, 2)]
  assert made.edges.shape == (2, BUCKETS - 1)
  assert made.neighbours.shape == made.buckets.shape == (ITEMS, ITEMS)
  more = {name: np.concatenate([rows, np.ones((5, rows.shape[1]))]) for name, rows in features.items()}
  grown = build_streams(COMPARE, None, more, histories, num_items=ITEMS + 5, seed=0)
  assert_array_equal(grown.edges, made.edges)  # Items that came later move no edge.
  plane = rng.normal(size=(2, 9))  # In which all vectors are: two dimensions hold them.
  flat = {"text": rng.normal(size=(ITEMS, 2)) @ plane, "image": np.zeros((ITEMS, 2))}
  narrow = dataclasses.replace(COMPARE, width=2)
  wide, few = (build_streams(s, None, flat, histories, num_items=ITEMS, seed=0) for s in (COMPARE, narrow))
  assert few.vectors[0].shape == (ITEMS, 2)
  np.testing.assert_allclose(few.vectors[0] @ few.vectors[0].T, wide.vectors[0] @ wide.vectors[0].T, atol=1e-5)
  np.testing.assert_allclose(few.edges, wide.edges, atol=1e-5)
  more = {name: np.concatenate([rows, np.full((5, rows.shape[1]), 9.0)]) for name, rows in flat.items()}
  grown = build_streams(narrow, None, more, histories, num_items=ITEMS + 5, seed=0)
  assert_array_equal(grown.vectors[0][:ITEMS], few.vectors[0])  # Nor any axis.
  alone = dataclasses.replace(COMPARE, streams=("features",))
  without = build_streams(alone, None, features, histories, num_items=ITEMS, seed=0)
  assert without.neighbours is without.signals is None
  titles = [f"number {item // 2}" for item in range(ITEMS)]
  for read in (True, False):
    settings = dataclasses.replace(COMPARE, titles=read)
    named = build_streams(settings, None, features, histories, num_items=ITEMS, seed=0, titles=titles)
    assert (named.signals.neighbours["titles"][:2, 0].tolist() == [1, 0]) == read
  none = dataclasses.replace(COMPARE, network_units=0)
  assert build_streams(none, None, features, histories, num_items=ITEMS, seed=0).signals is None
