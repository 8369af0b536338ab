"""Fits the tables of `candidate_similarity`, and its network, on transitions that the base has not seen."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bbqrec_jax.data.interactions import Interactions
from bbqrec_jax.data.ranking import ranking_batches
from bbqrec_jax.layers.apply import apply
from bbqrec_jax.recommender.candidate_similarity import CandidateSimilarity, unless_in
from bbqrec_jax.recommender.catalogue import CandidateStreams, Catalogue
from bbqrec_jax.recommender.model import SequenceModel
from bbqrec_jax.recommender.settings import CandidateSimilaritySettings, has_network, parts_of
from bbqrec_jax.recommender.signals import network, network_shapes, no_network
from bbqrec_jax.training.partitioning import Partitioner

_NEAR = 50  # Candidates that are near the history, and as many of each base.
_RELATED = 30  # Candidates of each relation of the last item.
_RANDOM = 100  # Candidates that stand for all others.
_LEAST_SPREAD = 1e-3  # A signal whose standard deviation among candidates is smaller is not read.
_FEWEST_USERS = 768  # That the network is fitted on: of fewer it learns more by heart than of what comes next.


def ramp(model: SequenceModel) -> Any:
  """Parameters of `CandidateSimilarity` that rise with the bucket and fall with the place, to find near items by."""
  s = model.settings.candidate_similarity
  steps = np.arange(s.num_buckets) / max(s.num_buckets - 1, 1)
  rows = (steps[None] / np.arange(1, s.last_items + 1)[:, None]).astype(np.float32)
  tables = np.tile(np.pad(rows, ((0, 0), (0, 2))), (model.settings.candidate_vectors, 1, 1))
  params: dict[str, Any] = {"scale": jnp.ones(len(parts_of(model.settings)[1])), "tables": jnp.asarray(tables)}
  if "behaviour" in s.streams:
    params["neighbour_table"] = jnp.asarray(rows)
  return params | (no_network(s.network_units) if has_network(s) else {})


def tables_of(curves: Any) -> Any:
  """Parameters of `CandidateSimilarity` from far fewer numbers: a curve over buckets, times a weight of each place.

  Args:
    curves: `scale` [bases], `buckets` [streams, n + 2] and, with the stream "behaviour", `neighbours` [n], and
      `places` [streams of either kind, R].
  """
  places, buckets = curves["places"], curves["buckets"]
  tables = {"scale": curves["scale"], "tables": places[: len(buckets), :, None] * buckets[:, None]}
  if "neighbours" in curves:
    tables["neighbour_table"] = places[-1][:, None] * curves["neighbours"][None]
  return tables


def make_collector(model: SequenceModel) -> Callable[[Any, Catalogue, Any], Any]:
  """The function that finds candidates for a batch of histories, for a partitioner to compile.

  Returns:
    (parameters, catalogue, batch) -> `items` [B, n] int32, the target first, -1 for none; `base` [B, n, bases]
    float32, their log-probabilities; `recent` [B, T] int32, the distinct items of the history; and `share` [B, n]
    float32, the log of how many items each stands for. The candidates are the first of each base, the nearest to the
    history, those that often stand with its last item, and random ones for all others.
  """
  proxy = ramp(model)

  def collect(params: Any, catalogue: Catalogue, batch: Any) -> dict[str, jax.Array]:
    seen = model.seen(batch)
    assert seen is not None
    states = apply(model, params, "last_states", catalogue, batch)
    target = batch["targets"][:, None]
    first = apply(model, params, "base_candidates", catalogue, states, width=_NEAR, seen=seen)
    near: Any = CandidateSimilarity(model.settings).apply({"params": proxy}, catalogue.candidates, seen)
    _, near = jax.lax.top_k(near, min(_NEAR, near.shape[1]))
    known = jnp.concatenate([target, unless_in(first, target)], axis=1)
    known = jnp.concatenate([known, unless_in(near, known)], axis=1)
    assert catalogue.candidates is not None
    if catalogue.candidates.signals is not None:
      for listed in catalogue.candidates.signals.neighbours.values():
        of_last = jnp.where(seen[:, :1] >= 0, listed[jnp.maximum(seen[:, 0], 0), :_RELATED], -1)
        known = jnp.concatenate([known, unless_in(of_last, known)], axis=1)
    count, number = catalogue.num_items, jnp.sum(known >= 0, axis=1, dtype=jnp.int32)
    drawn = unless_in(_spread(batch["targets"], count), known)
    drawn = unless_repeated(drawn)
    others = jnp.maximum(count - number, 0) / jnp.maximum(jnp.sum(drawn >= 0, axis=1), 1)
    items = jnp.concatenate([known, drawn], axis=1)
    share = jnp.where(jnp.arange(items.shape[1]) < known.shape[1], 0.0, jnp.log(jnp.maximum(others, 1e-9))[:, None])
    of_base = apply(model, params, "base_log_probs", catalogue, states, jnp.maximum(items, 0), seen)
    return {
      "items": items,
      "base": of_base.astype(jnp.float32),
      "recent": seen,
      "share": share,
    }

  return collect


def _spread(targets: jax.Array, count: int) -> jax.Array:
  """Random items [B, n] for targets [B]: a function of a row's target alone, whichever device works on it."""
  keys = jax.vmap(lambda target: jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), target))(targets)
  return jax.vmap(lambda key: jax.random.randint(key, (_RANDOM,), 0, count, jnp.int32))(keys)


def unless_repeated(items: jax.Array) -> jax.Array:
  """Items [B, n] with -1 in place of all but the first of equal ones."""
  same = (items[:, :, None] == items[:, None, :]) & jnp.tri(items.shape[1], k=-1, dtype=bool)[None]
  return jnp.where(jnp.any(same, axis=-1), -1, items)


def fit_similarity(
  params: Any,
  model: SequenceModel,
  shared: Any,
  catalogue: Catalogue,
  histories: Interactions,
  targets: np.ndarray,
  *,
  users: np.ndarray,
  seed: int,
  batch_size: int,
  max_length: int,
  bounds: tuple[int, ...],
  partitioner: Partitioner,
) -> tuple[Any, dict[str, float]]:
  """The parameters of `CandidateSimilarity` under which held-out transitions are the most likely.

  The base stays as it is. The softmax is over a user's candidates, random ones standing for all others: an estimate of
  that over the catalogue whose cost does not grow with it.

  A table of its own for each place has ten times the numbers of `tables_of`, and learns more of a few thousand users by
  heart than of the next ones. The network is fitted on 768 users or more, else it stays zero.

  Args:
    params: of the model, placed; whatever its tables hold.
    model: the recommender.
    shared: the catalogue, placed.
    catalogue: the same on the host.
    histories: what precedes the held-out transitions.
    targets: [U] int, what followed.
    users: [n] int, whose transitions count.
    seed: of all draws.
    batch_size: users at once, in looking for candidates.
    max_length: T.
    bounds: see `ranking_batches`.
    partitioner: how the work meets devices.

  Returns:
    The parameters, as NumPy arrays, and the mean negative log-likelihoods of the `first_pass` and the `last_pass`,
    and, where there is a network, of the last pass `with_network`.
  """
  found = collect_candidates(
    params, model, shared, histories, targets, users=users, batch_size=batch_size, max_length=max_length,
    bounds=bounds, partitioner=partitioner,
  )  # fmt: skip
  s, module = model.settings.candidate_similarity, CandidateSimilarity(model.settings)
  plain = no_network(s.network_units) if has_network(s) else {}
  streams, behaviour = model.settings.candidate_vectors, "behaviour" in s.streams
  curves: Any = {
    "buckets": jnp.zeros((streams, s.num_buckets + 2), jnp.float32),
    "places": jnp.tile(1 / jnp.sqrt(jnp.arange(1, s.last_items + 1, dtype=jnp.float32)), (streams + behaviour, 1)),
  }
  if behaviour:
    curves["neighbours"] = jnp.zeros(s.num_buckets, jnp.float32)

  def added(curves: Any, streams: Any, recent: jax.Array, items: jax.Array) -> jax.Array:
    return module.apply({"params": tables_of(curves) | plain}, streams, recent, items)  # type: ignore[return-value]

  fitted, losses = fit_added(curves, added, catalogue.candidates, found, settings=s, seed=seed)
  tables = tables_of(fitted) | plain
  if has_network(s) and len(users) >= _FEWEST_USERS:
    assert catalogue.candidates is not None
    tables, losses["with_network"] = fit_network(tables, module, catalogue.candidates, found, seed=seed)
  return jax.device_get(tables), losses


def collect_candidates(
  params: Any,
  model: SequenceModel,
  shared: Any,
  histories: Interactions,
  targets: np.ndarray,
  *,
  users: np.ndarray,
  batch_size: int,
  max_length: int,
  bounds: tuple[int, ...],
  partitioner: Partitioner,
) -> dict[str, np.ndarray]:
  """What `make_collector` finds for some users, [n, ...] each; the arguments are those of `fit_similarity`."""
  collect = partitioner.compile_map(make_collector(model))
  found: dict[str, np.ndarray] = {}
  batches = ranking_batches(
    histories, targets, users=users, batch_size=batch_size, max_length=max_length, bounds=bounds
  )
  for places, batch in batches:
    result = jax.device_get(collect(params, shared, batch))
    for name, rows in result.items():
      if name == "recent":
        rows = np.pad(rows, ((0, 0), (0, max_length - rows.shape[1])), constant_values=-1)
      found.setdefault(name, np.zeros((len(users), *rows.shape[1:]), rows.dtype))[places] = rows[: len(places)]
  return found


def fit_added(
  params: Any,
  added: Callable[[Any, Any, jax.Array, jax.Array], jax.Array],
  streams: Any,
  found: dict[str, np.ndarray],
  *,
  settings: CandidateSimilaritySettings,
  seed: int,
) -> tuple[Any, dict[str, float]]:
  """Fits what is added to the scores of candidates, together with factors of these.

  Args:
    params: of what is added, to begin with.
    added: (params, streams, recent [B, R] int, items [B, n] int) -> [B, n].
    streams: handed through to it.
    found: by `collect_candidates`.
    settings: how to fit.
    seed: of the order of the users.

  Returns:
    The parameters and `scale`, [bases]; and the losses, see `fit_similarity`.
  """
  bases = found["base"].shape[2]

  def loss(params: Any, streams: Any, batch: Any) -> jax.Array:
    more = added(params, streams, batch["recent"], jnp.maximum(batch["items"], 0))
    return _surprise(jnp.einsum("bns,s->bn", batch["base"], params["scale"]) + more, batch)

  # Bases are over-confident of what they have not seen: from 1 on the passes would go into coming down.
  params = {**params, "scale": jnp.full(bases, 0.5 / bases, jnp.float32)}
  s = settings
  params, means = _minimized(
    loss, params, streams, found, rows=s.batch_rows, passes=s.passes, learning_rate=s.learning_rate, seed=seed
  )
  return params, {"first_pass": means[0], "last_pass": means[-1]}


def fit_network(
  tables: Any, module: CandidateSimilarity, streams: CandidateStreams, found: dict[str, np.ndarray], *, seed: int
) -> tuple[Any, float]:
  """Fits the network of signals on top of fitted tables.

  Args:
    tables: parameters of `CandidateSimilarity`; whatever the network's are.
    module: what they are of.
    streams: of the catalogue.
    found: by `collect_candidates`.
    seed: of the first parameters, and of the order of the users.

  Returns:
    The parameters with the network's, and the loss of the last pass.
  """
  s, rng = module.settings.candidate_similarity, np.random.default_rng([seed, 13])
  shapes = network_shapes(s.network_units)
  blank = tables | no_network(s.network_units)

  @jax.jit
  def read(streams: CandidateStreams, batch: Any) -> tuple[jax.Array, jax.Array]:
    items, last = jnp.maximum(batch["items"], 0), batch["base"][..., -1]
    added = module.apply({"params": blank}, streams, batch["recent"], items)
    values = module.apply({"params": blank}, streams, batch["recent"], last, added, items, method="signals")
    return jnp.einsum("bns,s->bn", batch["base"], tables["scale"]) + added, jnp.stack(values, axis=-1)  # type: ignore

  with jax.default_device(jax.local_devices()[0]):
    count = len(found["items"])
    parts = [np.arange(first, first + s.batch_rows) % count for first in range(0, count, s.batch_rows)]
    read_parts = [jax.device_get(read(streams, {name: part[rows] for name, part in found.items()})) for rows in parts]
  scores, values = (np.concatenate(part)[:count] for part in zip(*read_parts, strict=True))
  real = values[found["items"] >= 0]
  params = {
    "direct": np.zeros(shapes["direct"], np.float32),
    "hidden": rng.normal(scale=0.3, size=shapes["hidden"]).astype(np.float32),
    "bias": np.zeros(shapes["bias"], np.float32),
    "output": np.zeros(shapes["output"], np.float32),
  }
  spread = real.std(axis=0)
  # What hardly differs here tells nothing, and must not be anything where it does differ.
  scale = np.where(spread > _LEAST_SPREAD, 1 / np.maximum(spread, _LEAST_SPREAD), 0).astype(np.float32)
  fixed = {"signal_mean": real.mean(axis=0), "signal_scale": scale}

  def loss(params: Any, streams: Any, batch: Any) -> jax.Array:
    del streams
    more = network({**params, **fixed}, [batch["signals"][..., place] for place in range(values.shape[-1])])
    return _surprise(batch["scores"] + more, batch)

  data = {name: found[name] for name in ("items", "share")} | {"scores": scores, "signals": values}
  fitted, means = _minimized(
    loss, params, None, data, rows=s.batch_rows, passes=s.network_passes, learning_rate=s.learning_rate / 2, seed=seed
  )
  return tables | fitted | fixed, means[-1]


def _surprise(scores: jax.Array, batch: Any) -> jax.Array:
  """The mean negative log-likelihood of the first candidate of each row, by scores [B, n]."""
  scores = jnp.where(batch["items"] < 0, -jnp.inf, scores + batch["share"])
  surprise = jax.nn.logsumexp(scores, axis=1) - scores[:, 0]
  return jnp.sum(surprise * batch["weight"]) / jnp.maximum(jnp.sum(batch["weight"]), 1.0)


def _minimized(
  loss: Callable[[Any, Any, Any], jax.Array],
  params: Any,
  shared: Any,
  data: dict[str, np.ndarray],
  *,
  rows: int,
  passes: int,
  learning_rate: float,
  seed: int,
) -> tuple[Any, list[float]]:
  """Parameters that make the mean loss of rows small, by Adam on the first local device.

  Args:
    loss: (parameters, shared, batch) -> [], whose batch has `weight` [B] float32: 0 where a row only fills.
    params: to begin with.
    shared: handed through to it.
    data: [n, ...] each.
    rows: of a batch.
    passes: over the data.
    learning_rate: that falls to zero over them.
    seed: of the order of the rows.

  Returns:
    The parameters, and the mean loss of each pass.
  """
  count, rng = len(next(iter(data.values()))), np.random.default_rng([seed, 7])
  optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, passes * -(-count // rows)))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params: Any, state: Any, shared: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
    value, gradient = jax.value_and_grad(loss)(params, shared, batch)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, value

  with jax.default_device(jax.local_devices()[0]):
    params = jax.tree.map(jnp.array, params)
    state, means = optimizer.init(params), []
    for _ in range(passes):
      order, losses = rng.permutation(count), []
      for first in range(0, count, rows):
        some = order[first : first + rows]
        weight = np.arange(rows) < len(some)
        some = np.resize(some, rows)
        batch = {name: part[some] for name, part in data.items()} | {"weight": weight.astype(np.float32)}
        params, state, value = step(params, state, shared, batch)
        losses.append(value)
      means.append(float(np.mean(jax.device_get(losses))))
  return params, means
