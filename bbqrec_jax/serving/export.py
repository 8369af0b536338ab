"""A finished run as a bundle, and the comparison of a bundle with the live model."""

import os
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.export  # Not a part of what `import jax` brings.
import jax.numpy as jnp
import numpy as np

import bbqrec_jax
from bbqrec_jax.data.directory import has_items
from bbqrec_jax.data.encoding import catalogue as catalogue_file
from bbqrec_jax.data.interactions import Interactions, from_lengths, select_users
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.data.preparation.records import flat_text
from bbqrec_jax.errors import InputError
from bbqrec_jax.layers.apply import apply
from bbqrec_jax.recommender.candidate_similarity import stream_vectors
from bbqrec_jax.recommender.catalogue import Catalogue
from bbqrec_jax.recommender.model import SequenceModel
from bbqrec_jax.runs.restore import Restored
from bbqrec_jax.serving.bundle import FILES, FORMAT, Answer, Bundle, Query, file_digest, require_packages, same
from bbqrec_jax.serving.precompute import precompute
from bbqrec_jax.serving.recommend import recommend_all
from bbqrec_jax.utils.files import unfinished
from bbqrec_jax.utils.json_files import write_json

BATCH_SIZES = (1, 4, 8, 16)
WIDTHS = (32, 256)  # Of a history and a few items more; of a long list.
_CHECKED = 8  # Histories of `check.json`.


class Comparison(NamedTuple):
  """How a bundle's answers stand beside the live model's.

  Attributes:
    users: how many were asked about.
    identical: of them, those with the same list.
    equal: of the others, those with the same list but for neighbours whose scores are nearly the same.
    difference: the largest of two scores at the same place.
  """

  users: int
  identical: int
  equal: int
  difference: float


def export_recommender(
  model: SequenceModel,
  params: Any,
  catalogue: Catalogue,
  *,
  top: int,
  beam_width: int,
  platforms: Iterable[str] = ("cpu", "cuda", "tpu"),
) -> tuple[bytes, dict[str, np.ndarray]]:
  """What turns histories into recommendations, constrained decoding included, as StableHLO.

  Args:
    model: the recommender.
    params: its parameters.
    catalogue: the items.
    top: how many items a history gets; all of them, if the catalogue has fewer.
    beam_width: of a head that searches; at least `top` beams are kept.
    platforms: kinds of devices that it is to run on, of cpu, cuda, rocm, tpu.

  Returns:
    (function, arrays): `jax.export.deserialize(function).call(list of arrays, histories, exclude)` gives
    (items [B, top] int32, scores [B, top] float32), best first, -1 where no item is left. `histories` [B, T] int32 are
    a history's last T items in time order from the left, `exclude` [B, E] int32 the items that must not come back; -1
    fills both. A model with time buckets takes a fourth: the second of each interaction, [B, T] int32, from any moment
    on.
  """
  settings = model.settings
  named, structure = jax.tree_util.tree_flatten_with_path({"params": params, "catalogue": catalogue})
  arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in named}
  # A list that is cut afterwards is made by a sort of all items: XLA knows the best few of many only where they stay.
  width = min(top if model.exact else max(beam_width, top), catalogue.num_items)

  def serve(held, histories, exclude, *times):
    params, catalogue = (jax.tree.unflatten(structure, held)[name] for name in ("params", "catalogue"))
    real = histories >= 0
    batch = {
      "items": jnp.maximum(histories, 0),
      "segments": real.astype(jnp.int32),
      "positions": jnp.where(real, jnp.arange(settings.max_length, dtype=jnp.int32), 0),
    }
    if times:
      batch["times"] = jnp.where(real, times[0], 0)
    states = apply(model, params, "last_states", catalogue, batch)
    seen = model.seen(batch)
    found = apply(model, params, "search", catalogue, states, width=width, exclude=exclude, seen=seen)
    return found.items[:, :top], found.log_probs[:, :top]

  rows, excluded = jax.export.symbolic_shape("b, e", constraints=("b >= 1", "e >= 1"))
  of_items = jax.ShapeDtypeStruct((rows, settings.max_length), jnp.int32)
  shapes = [of_items, jax.ShapeDtypeStruct((rows, excluded), jnp.int32)] + [of_items] * bool(settings.time_buckets)
  rest, needed = precompute(serve, arrays, *shapes)
  held = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in needed.values()]
  exported = jax.export.export(jax.jit(rest), platforms=tuple(platforms))(held, *shapes)
  return bytes(exported.serialize()), needed


def similarity_vectors(restored: Restored) -> dict[str, np.ndarray]:
  """Unit vectors [N, d] float32 that items are compared by: of each modality and fused, or the model's own.

  Zero rows where an item lacks a modality. The last stream is the one to look for similar items by.
  """
  if restored.ids is not None:
    chosen = [*restored.ids.modalities, "fused"]
    vectors = {name: restored.ids.vectors(name) for name in chosen}
  else:
    own = apply(restored.model, restored.params, "item_vectors", restored.catalogue)
    vectors = {"items": np.asarray(own, np.float32)}
  lengths = {name: np.linalg.norm(array, axis=1, keepdims=True) for name, array in vectors.items()}
  return {name: array / np.where(lengths[name] > 0, lengths[name], 1) for name, array in vectors.items()}


def _similarity_arrays(restored: Restored) -> tuple[dict[str, Any] | None, dict[str, np.ndarray]]:
  """What `bundle.json` says of candidate similarity, None for a model without; and the arrays of it, by their paths."""
  candidates, settings = restored.catalogue.candidates, restored.model.settings.candidate_similarity
  if candidates is None or not settings.streams:
    return None, {}
  streams = stream_vectors(settings, restored.ids, restored.dataset.features)
  within: dict[str, Any] = {f"vectors/{index}": rows for index, rows in enumerate(candidates.vectors)} | {
    "edges": candidates.edges
  }
  tables = restored.params["candidate_similarity"]
  learned = {"tables": tables["tables"]}
  if "neighbour_table" in tables:
    within |= {"neighbours": candidates.neighbours, "buckets": candidates.buckets}
    learned["neighbour_table"] = tables["neighbour_table"]
  paths = {name: f"catalogue/candidates/{name}" for name in within}
  paths |= {name: f"params/candidate_similarity/{name}" for name in learned}
  arrays = {paths[name]: np.asarray(array) for name, array in (within | learned).items()}
  return {"streams": list(streams), "arrays": paths}, arrays


def read_attributes(folders: Iterable[pathlib.Path], item_ids: ItemIds) -> dict[str, list[Any]]:
  """Brand, category and price of the items, as far as the `items.jsonl` of their folders says; see `Attributes`.

  Args:
    folders: of the data, then of new items; those without such a file say nothing.
    item_ids: of the N items that are wanted.
  """
  columns: dict[str, list[Any]] = {
    "brand": [""] * len(item_ids), "category": [[] for _ in range(len(item_ids))], "price": [None] * len(item_ids)
  }  # fmt: skip
  line = 0
  for folder in filter(has_items, folders):
    for record in catalogue_file.read_items(catalogue_file.items_file(folder)):
      (row,) = item_ids.rows([str(record.get("id", line))])
      line += 1
      if row >= 0:
        columns["brand"][row] = flat_text(record.get("brand"))
        columns["category"][row] = catalogue_file.category_levels(record)
        columns["price"][row] = catalogue_file.attributes_of({"price": record.get("price")})[1]
  return {name: own for name, own in columns.items() if any(one not in ("", [], None) for one in own)}


def _live(restored: Restored, histories: Interactions, *, top: int) -> list[Answer]:
  """What the live model answers."""
  found = recommend_all(
    restored.model,
    restored.params,
    restored.catalogue,
    histories,
    top=top,
    beam_width=restored.config.evaluation.beam_width,
    batch_size=restored.config.evaluation.batch_size,
  )
  return [Answer(items, scores) for _, items, scores in found]


def _drawn_histories(restored: Restored) -> Interactions:
  """Histories of drawn items, which are nobody's."""
  rng, length = np.random.default_rng(0), restored.model.settings.max_length
  lengths = rng.integers(1, length + 1, size=_CHECKED)
  items = rng.integers(restored.catalogue.num_items, size=lengths.sum())
  times = np.concatenate([np.sort(rng.integers(10**6, size=count)) for count in lengths]).astype(np.float64)
  return from_lengths(items, lengths, np.arange(_CHECKED).astype(str), times)


def _parts(histories: Interactions) -> list[tuple[np.ndarray, np.ndarray | None]]:
  """The items and the times of each history."""
  places = [slice(*pair) for pair in zip(histories.offsets[:-1], histories.offsets[1:], strict=True)]
  return [(histories.items[own], None if histories.times is None else histories.times[own]) for own in places]


def write_bundle(
  folder: pathlib.Path,
  restored: Restored,
  *,
  top: int,
  platforms: Iterable[str],
  batch_sizes: Iterable[int] = BATCH_SIZES,
  widths: Iterable[int] = WIDTHS,
  attributes: dict[str, list[Any]] | None = None,
  about: dict[str, Any] | None = None,
  users: int = 0,
) -> tuple[dict[str, Any], Comparison | None]:
  """Makes the folder that `bundle.Bundle` reads, whole or not at all.

  Args:
    folder: that is made.
    restored: the run.
    top: how many items an answer may have.
    platforms: kinds of devices that it is to run on, of cpu, cuda, rocm, tpu.
    batch_sizes: numbers of histories that a server has programs for.
    widths: numbers of items to leave out, or to allow, that it has programs for.
    attributes: of the items, see `read_attributes`; None for none.
    about: what else `bundle.json` is to say: of the data, and what the run reached.
    users: about how many users it is asked beside the live model before it takes its name.

  Returns:
    (what `bundle.json` says, how the bundle compared; None where nobody was asked about).

  Raises:
    InputError: if a package is missing, or the bundle gives other lists than the live model.
  """
  require_packages()
  from safetensors.numpy import save_file

  model, catalogue, platforms = restored.model, restored.catalogue, list(platforms)
  top = min(top, catalogue.num_items)
  function, arrays = export_recommender(
    model,
    restored.params,
    catalogue,
    top=top,
    beam_width=restored.config.evaluation.beam_width,
    platforms=platforms,
  )
  vectors = similarity_vectors(restored)
  histories = _drawn_histories(restored)
  timed = bool(model.settings.time_buckets)
  checks = [
    {
      "history": items.tolist(),
      "times": times.tolist() if timed and times is not None else None,
      "items": answer.items.tolist(),
      "scores": answer.scores.tolist(),
    }
    for (items, times), answer in zip(_parts(histories), _live(restored, histories, top=top), strict=True)
  ]
  compared_by, similarity = _similarity_arrays(restored)
  partial = unfinished(folder)
  partial.mkdir(parents=True, exist_ok=True)
  (partial / "recommend.bin").write_bytes(function)
  weights = {name: np.array(array, order="C") for name, array in (similarity | arrays).items()}
  nearness = {name: np.array(array, order="C") for name, array in vectors.items()}
  for name, held in (("weights.safetensors", weights), ("similarity.safetensors", nearness)):
    save_file(held, partial / name)
    shutil.copymode(partial / "recommend.bin", partial / name)  # It is the owner's alone otherwise.
  items: dict[str, Any] = {"ids": restored.dataset.item_ids.to_json(), "titles": list(restored.dataset.titles)}
  if attributes:
    items["attributes"] = attributes
  write_json(partial / "items.json", items)
  write_json(partial / "check.json", {"queries": checks})
  note = {
    "format": FORMAT,
    "inputs": ["histories", "exclude", *(["times"] if timed else [])],
    "limits": {
      "max_length": model.settings.max_length,
      "top": top,
      "batch_sizes": sorted(batch_sizes),
      "widths": sorted(widths),
    },
    "num_items": catalogue.num_items,
    "streams": list(vectors),
    "candidate_similarity": compared_by,
    "platforms": platforms,
    "head": model.settings.head,
    "semantic_ids": None if restored.ids is None else restored.ids.fingerprint,
    "jax": jax.__version__,
    "bbqrec_jax": bbqrec_jax.__version__,
    "arrays": list(arrays),
    "files": {name: file_digest(partial / name) for name in FILES},
    **(about or {}),
  }
  write_json(partial / "bundle.json", note)
  compared = compare_with_live(Bundle(partial), restored, users=users) if users else None
  if compared is not None and (others := compared.users - compared.identical - compared.equal):
    raise InputError(
      f"{partial}: expected the lists of the live model for {compared.users} users, {others} have others; do not serve"
      " it, and tell the project"
    )
  os.rename(partial, folder)
  return note, compared


def compare_with_live(bundle: Bundle, restored: Restored, *, users: int, seed: int = 0) -> Comparison:
  """Asks both about the whole histories of drawn users, as many as there are at most."""
  known = restored.dataset.interactions
  chosen = np.random.default_rng(seed).permutation(known.num_users)[:users]
  histories = select_users(known, chosen)
  queries = [Query(items, items, times=times) for items, times in _parts(histories)]
  identical = equal = 0
  difference = 0.0
  live = _live(restored, histories, top=bundle.limits["top"])
  for own, expected in zip(bundle.answer(queries), live, strict=True):
    agrees = same(own, expected)
    alike = agrees and np.array_equal(own.items, expected.items)
    identical += alike
    equal += agrees - alike
    if len(own.scores) == len(expected.scores) > 0:
      difference = max(difference, float(np.abs(own.scores - expected.scores).max()))
  return Comparison(len(chosen), identical, equal, difference)
