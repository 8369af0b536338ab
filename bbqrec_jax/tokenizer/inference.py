"""Inference with a trained tokenizer: quantizes items with the arrays of an artefact alone."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from bbqrec_jax.errors import InputError, shown
from bbqrec_jax.layers.apply import apply
from bbqrec_jax.tokenizer.kmeans import content_latents
from bbqrec_jax.tokenizer.model import Tokenizer
from bbqrec_jax.tokenizer.parts import check_parts
from bbqrec_jax.tokenizer.quantizers import make_quantizer
from bbqrec_jax.tokenizer.settings import TokenizerSettings
from bbqrec_jax.utils.files import is_plain_name
from bbqrec_jax.utils.settings import foreign_code, from_config

_MEND = "train the tokenizer again"


def settings_from_json(values: Mapping[str, Any], *, trusted: Collection[str] = ()) -> TokenizerSettings:
  """`TokenizerSettings` from an artefact, which may come from an untrusted source.

  Args:
    values: of the fields.
    trusted: Python modules outside this project that its parts may be imported from; no other code of it is run.

  Raises:
    InputError: if a field is missing, unknown, or breaks its rules, or a part is code that is not trusted.
  """
  given = dict(values)
  shapes = {name: _tuples(given.pop(name)) for name in ("modalities", "num_items") if name in given}
  for name, fits in (("modalities", _are_modalities), ("num_items", _is_size)):
    if name not in shapes:
      raise InputError(f"tokenizer setting {name} is missing; {_MEND}")
    if not fits(shapes[name]):
      raise InputError(f"tokenizer setting {name}: expected another value than {shown(repr(shapes[name]))}; {_MEND}")
  for name, code in foreign_code(TokenizerSettings, given):
    if code.partition(":")[0] not in trusted:
      module = shown(code.partition(":")[0])[1:-1]
      raise InputError(
        f"tokenizer setting {name} names code outside this project, {shown(code)}, and reading an artefact runs none:"
        f" if you trust it, say --trust={module}"
      )
  try:
    settings = dataclasses.replace(from_config(TokenizerSettings, given), **shapes)
    check_parts(settings, field="config field ")
    return settings
  except InputError as error:
    raise InputError(f"the tokenizer's settings do not fit this version: {_MEND} ({error})") from error


def _are_modalities(value: Any) -> bool:
  pairs = isinstance(value, tuple) and all(isinstance(one, tuple) and len(one) == 2 for one in value)
  named = pairs and all(isinstance(name, str) and is_plain_name(name) and _is_size(width) for name, width in value)
  return named and 0 < len(value) == len({name for name, _ in value})


def _is_size(value: Any) -> bool:
  return type(value) is int and 0 < value < 2**31


def _tuples(value: Any) -> Any:
  """A JSON value with tuples for its lists and for the lists in it."""
  return tuple(tuple(one) if isinstance(one, list) else one for one in value) if isinstance(value, list) else value


def check_arrays(settings: TokenizerSettings, encoder: Mapping[str, np.ndarray], codebooks: np.ndarray) -> None:
  """Checks the arrays of an artefact, which may come from an untrusted source, for `InferenceTokenizer`.

  Raises:
    InputError: if an array of the encoder is missing or not needed, has another shape, or is not of finite float32
      numbers (statistics of features may be float64, and deviations are more than 0), or the codebooks have another
      shape than the settings say.
  """
  quantizer = make_quantizer(settings)
  _check_array("codebooks", codebooks, quantizer.codebook_shape)
  fixed = quantizer.fixed()
  if fixed is not None and not np.array_equal(codebooks, fixed):
    raise InputError(f"the tokenizer's array 'codebooks' is not what its quantizer has: {_MEND}")
  expected: dict[str, tuple[int, ...]] = {
    f"{part}/{name}": (width,) for name, width in settings.modalities for part in ("mean", "deviation")
  }
  if quantizer.trained:
    expected |= {f"params/{name}": shape for name, shape in _parameter_shapes(settings).items()}
    expected |= {"item_id": (settings.code_width,)} if settings.item_id != "none" else {}
  for name in sorted(expected.keys() ^ encoder.keys()):
    what = "is missing" if name in expected else "is not needed by its settings"
    raise InputError(f"the tokenizer's array {name!r} {what}: its files do not fit one another; {_MEND}")
  for name, array in encoder.items():
    _check_array(name, array, expected[name])


def _check_array(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
  """Refuses an array of another shape, or of numbers that it cannot have.

  Raises:
    InputError: if it is one.
  """
  dtypes = ("float32", "float64") if name.startswith(("mean/", "deviation/")) else ("float32",)
  if (
    array.shape != shape
    or array.dtype.name not in dtypes
    or not np.isfinite(array).all()
    or (name.startswith("deviation/") and np.any(array < np.finfo(array.dtype).tiny))
  ):
    raise InputError(
      f"the tokenizer's array {name!r}: expected finite {' or '.join(dtypes)} {list(shape)}, got {array.dtype}"
      f" {list(array.shape)}, or numbers that it cannot have; {_MEND}"
    )


def _parameter_shapes(settings: TokenizerSettings) -> dict[str, tuple[int, ...]]:
  """Shapes of the parameters that quantize items, by name; nothing is allocated."""
  model = Tokenizer(settings)
  features = {name: jax.ShapeDtypeStruct((1, width), jnp.float32) for name, width in settings.modalities}
  present = dict.fromkeys(settings.names, jax.ShapeDtypeStruct((1,), bool))
  item_id = jax.ShapeDtypeStruct((1, settings.code_width), jnp.float32) if settings.item_id != "none" else None
  init = functools.partial(model.init, method="fuse")
  params = jax.eval_shape(init, jax.random.key(0), item_id, features, present)["params"]
  return {name: leaf.shape for name, leaf in _needed(params).items()}


def _needed(params: Any) -> dict[str, Any]:
  """The parameters that quantize items, by name, without the ID vectors."""
  needed = {name: value for name, value in params.items() if name.startswith("behaviour_encoders_")}
  return flax.traverse_util.flatten_dict(needed, sep="/")


def inference_parameters(settings: TokenizerSettings, params: Any) -> dict[str, np.ndarray]:
  """The parameters that quantize items, by name, and the mean of the ID vectors, which stands for a new item's."""
  arrays = {f"params/{name}": np.asarray(value) for name, value in _needed(params).items()}
  if settings.item_id != "none":
    arrays["item_id"] = np.asarray(params["item_embedding"]["embedding"]).mean(axis=0)
  return arrays


class InferenceTokenizer:
  """Latents and codes of items, known or new, from settings and arrays alone."""

  def __init__(self, settings: TokenizerSettings, encoder: Mapping[str, np.ndarray], codebooks: np.ndarray):
    """Takes what an artefact holds: see `semantic_ids.artefact.SemanticIds`."""
    self.settings = settings
    self._item_id = encoder.get("item_id")
    flat = {name.removeprefix("params/"): value for name, value in encoder.items() if name.startswith("params/")}
    self._params = flax.traverse_util.unflatten_dict(flat, sep="/")
    self._codebooks, quantizer = codebooks, make_quantizer(settings)
    self._trained = quantizer.trained
    if quantizer.fixed() is None:
      self._params |= {"codebooks": codebooks}
    self._content = jax.jit(jax.vmap(lambda rows, books: quantizer.encode(rows, books).codes))
    model = Tokenizer(settings)

    def encode(params, item_id, features, present):
      latents = apply(model, params, "fuse", item_id, features, present)
      return latents.values, latents.present, apply(model, params, "quantize", latents.values).codes

    self._encode = jax.jit(encode)

  def __call__(
    self, features: dict[str, np.ndarray], present: dict[str, np.ndarray], item_id: np.ndarray | None = None
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantizes a block of items.

    Args:
      features: modality -> [B, D] standardised.
      present: modality -> [B] bool.
      item_id: [B, d] ID vectors; None takes the mean of those that were learned.

    Returns:
      latents [S, B, d], present [S, B], codes [S, B, L].
    """
    if not self._trained:
      values, masks = content_latents(features, present)
      return values, masks, np.asarray(self._content(values, self._codebooks))
    rows = len(next(iter(present.values())))
    if item_id is None and self._item_id is not None:
      item_id = np.broadcast_to(self._item_id, (rows, len(self._item_id)))
    latents, masks, codes = jax.device_get(self._encode(self._params, item_id, features, present))
    return latents, masks, codes


def id_space(
  settings: TokenizerSettings, latents: np.ndarray, codes: np.ndarray, codebooks: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The codes that make up semantic IDs, and latents and codebooks that they are a residual quantization of.

  IDs of several streams, one after the other, are one quantization in the product of their spaces: each stream's
  codewords are zero in the others' columns.

  Args:
    settings: of the tokenizer.
    latents: [S, N, d].
    codes: [S, N, L].
    codebooks: [G, L, K, d].

  Returns:
    codes [N, P L], latents [N, P d] and codebooks [P L, K, P d], for the P streams that make the ID.
  """
  chosen = [settings.streams.index(name) for name in settings.id_streams]
  latents = np.asarray(make_quantizer(settings).bounded(jnp.asarray(latents)))
  if len(chosen) == 1:
    index = chosen[0]
    return codes[index], latents[index], codebooks[index % len(codebooks)]
  _, levels, num_codes, width = codebooks.shape
  product = np.zeros((len(chosen), levels, num_codes, len(chosen), width), np.float32)
  for place, index in enumerate(chosen):
    product[place, :, :, place] = codebooks[index % len(codebooks)]
  return (
    np.concatenate([codes[index] for index in chosen], axis=1),
    np.concatenate([latents[index] for index in chosen], axis=1),
    product.reshape(len(chosen) * levels, num_codes, -1),
  )


def encode_blocks(
  encode: Callable[[np.ndarray], Sequence[Any]], num_items: int, *, block: int
) -> tuple[np.ndarray, ...]:
  """Runs `encode` (items [B] -> arrays [S, B, ...]) over all items in blocks of one shape, and joins the results."""
  block = min(block, num_items)
  whole: list[np.ndarray] = []
  for first in range(0, num_items, block):
    # The last block reaches back, so that every block has one shape and is compiled once.
    items = np.arange(block, dtype=np.int32) + min(first, num_items - block)
    results = jax.device_get(encode(items))
    if not whole:
      whole = [np.empty((part.shape[0], num_items, *part.shape[2:]), part.dtype) for part in results]
    for array, part in zip(whole, results, strict=True):
      array[:, items] = part
  return tuple(whole)
