"""A finished run as a function for JAX alone.

The folder holds `function.bin`, the compiled program's source in StableHLO, for any number of histories at once and for
several kinds of devices; `arrays.npz`, the parameters and the catalogue that it takes; `item_ids.json`, what the data
calls the items whose numbers it takes and gives; and `export.json`, which says what these are. Whoever calls it needs
JAX and flatbuffers, and nothing of this package.
"""

import importlib.util
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.export  # Not a part of what `import jax` brings.
import jax.numpy as jnp
import numpy as np

from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.errors import InputError
from bbqrec_jax.layers.apply import apply
from bbqrec_jax.recommender.catalogue import Catalogue
from bbqrec_jax.recommender.model import SequenceModel
from bbqrec_jax.utils.files import check_file, read_archive, unfinished
from bbqrec_jax.utils.json_files import read_json, write_json


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
  arrays = {
    f"{place:04d} {jax.tree_util.keystr(path, simple=True, separator='/')}": np.asarray(leaf)
    for place, (path, leaf) in enumerate(named)
  }
  width = min(max(beam_width, top), catalogue.num_items)

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
  held = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays.values()]
  exported = jax.export.export(jax.jit(serve), platforms=tuple(platforms))(held, *shapes)
  return bytes(exported.serialize()), arrays


def write_export(
  folder: pathlib.Path,
  model: SequenceModel,
  params: Any,
  catalogue: Catalogue,
  *,
  top: int,
  beam_width: int,
  platforms: Iterable[str],
  item_ids: ItemIds,
  fingerprint: str | None = None,
) -> dict[str, Any]:
  """Makes the folder, whole or not at all, of what `export_recommender` gives.

  Args:
    folder: that is made.
    model: as for `export_recommender`, and so are the others.
    params: see there.
    catalogue: see there.
    top: see there.
    beam_width: see there.
    platforms: see there.
    item_ids: what the data calls the items, for `item_ids.json`.
    fingerprint: of the semantic IDs.

  Returns:
    What `export.json` says.
  """
  platforms = list(platforms)
  function, arrays = export_recommender(model, params, catalogue, top=top, beam_width=beam_width, platforms=platforms)
  note = {
    "inputs": ["histories", "exclude", *(["times"] if model.settings.time_buckets else [])],
    "max_length": model.settings.max_length,
    "num_items": catalogue.num_items,
    "top": min(top, catalogue.num_items),
    "platforms": platforms,
    "jax": jax.__version__,
    "semantic_ids": fingerprint,
    "arrays": list(arrays),
  }
  partial = unfinished(folder)
  partial.mkdir(parents=True, exist_ok=True)
  (partial / "function.bin").write_bytes(function)
  np.savez(partial / "arrays.npz", **arrays)  # type: ignore[arg-type]
  write_json(partial / "item_ids.json", {"items": item_ids.to_json()})
  write_json(partial / "export.json", note)
  os.rename(partial, folder)
  return note


def require_flatbuffers() -> None:
  """Refuses to go on without flatbuffers.

  Raises:
    InputError: if it is missing.
  """
  if importlib.util.find_spec("flatbuffers") is None:
    raise InputError("JAX keeps an exported function with flatbuffers: pip install 'bbqrec_jax[export]'")


def load_export(folder: pathlib.Path) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """The function of an exported folder, its arrays given: (histories, exclude[, times]) -> (items, scores).

  All of items by number, from 0; the folder's `item_ids.json` has what the data calls them, in that order.

  Raises:
    InputError: if the folder holds no export, or one that was changed, or flatbuffers is missing.
  """
  require_flatbuffers()
  note = read_json(folder / "export.json")
  check_file(folder / "function.bin")
  arrays = read_archive(folder / "arrays.npz")
  if note.get("arrays") != list(arrays):
    raise InputError(f"{folder / 'arrays.npz'}: expected the arrays that export.json names; export it again")
  held = [jnp.asarray(array) for array in arrays.values()]
  try:
    exported = jax.export.deserialize(bytearray((folder / "function.bin").read_bytes()))
  except Exception as error:
    raise InputError(f"{folder / 'function.bin'}: expected what `bbqrec export` wrote; export it again") from error
  call = jax.jit(exported.call)
  return lambda *inputs: call(held, *(jnp.asarray(array, jnp.int32) for array in inputs))
