"""The losses of stage 1: what binds the tokenizer's codes to content and to behaviour."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bbqrec_jax.errors import InputError
from bbqrec_jax.layers.apply import apply
from bbqrec_jax.ops.contrastive import following, info_nce
from bbqrec_jax.ops.quantize import straight_through
from bbqrec_jax.ops.reduction import masked_mean
from bbqrec_jax.tokenizer.model import Tokenizer
from bbqrec_jax.tokenizer.quantizers import make_quantizer
from bbqrec_jax.tokenizer.settings import LossWeights, TokenizerSettings
from bbqrec_jax.utils.named import named


class CatalogueRows(NamedTuple):
  """What a loss of one's own is given: B items of the catalogue, and what the tokenizer makes of them.

  Attributes:
    items: [B] int.
    features: modality -> [B, D], standardised; zeros where it is absent.
    present: stream -> [B] bool; streams are the modalities, "id" where the tokenizer has item IDs, and "fused".
    latents: stream -> [B, d], what is quantized.
    quantized: stream -> [B, d], the sum of the codewords, whose gradient is the latent's; in the warm-up, the latent.
    codes: stream -> [B, L] int.
    specific: modality -> [B, d].
  """

  items: jax.Array
  features: dict[str, jax.Array]
  present: dict[str, jax.Array]
  latents: dict[str, jax.Array]
  quantized: dict[str, jax.Array]
  codes: dict[str, jax.Array]
  specific: dict[str, jax.Array]


# A loss of one's own: [B], a number an item. Its mean over the items of all devices is what counts.
OwnLoss = Callable[[CatalogueRows], jax.Array]


def find_own_loss(name: str) -> OwnLoss | None:
  """The function of `tokenizer.own_loss`; None for "".

  Raises:
    InputError: if there is no such function.
  """
  if not name:
    return None
  try:
    found = named(name, {})
  except ValueError as error:
    raise InputError(f"config field tokenizer.own_loss: {error}") from error
  if not callable(found):
    raise InputError(f"config field tokenizer.own_loss: expected a function, got {name!r}, a {type(found).__name__}")
  return found


def check_own_loss(name: str, settings: TokenizerSettings, *, batch_items: int) -> None:
  """Tries the function of `tokenizer.own_loss` on shapes alone, as a step of training would call it.

  Args:
    name: the field's value; "" is none.
    settings: of the tokenizer.
    batch_items: B.

  Raises:
    InputError: if there is no such function, it fails, or it gives anything else than a number an item.
  """
  own_loss = find_own_loss(name)
  if own_loss is None:
    return

  def array(*shape: int, dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct((batch_items, *shape), dtype)

  vectors = dict.fromkeys(settings.streams, array(settings.code_width))
  rows = CatalogueRows(
    items=array(dtype=jnp.int32),
    features={name: array(width) for name, width in settings.modalities},
    present=dict.fromkeys(settings.streams, array(dtype=jnp.bool_)),
    latents=vectors,
    quantized=vectors,
    codes=dict.fromkeys(settings.streams, array(settings.num_levels, dtype=jnp.int32)),
    specific=dict.fromkeys(settings.names, array(settings.code_width)),
  )
  try:
    jax.eval_shape(lambda rows: _own(own_loss, rows, axis_name=None), rows)
  except InputError:
    raise
  except Exception as error:  # It may be anybody's code.
    raise InputError(
      f"config field tokenizer.own_loss = {name!r}: expected a function of CatalogueRows (see"
      f" bbqrec_jax/tokenizer/losses.py), got {type(error).__name__}: {error}"
    ) from error


class TokenizerOutput(NamedTuple):
  """What a step needs besides the loss.

  Attributes:
    terms: the unweighted losses and the contrast's accuracy, each this device's share.
    codes: [S, B, L] what each row chose.
    residuals: [S, L, B, d] what each level was given.
    present: [S, B] bool, the rows whose stream is present.
    quantized: modality -> [B, d], what the CLUB bound predicts from; carries no gradient.
    specific: modality -> [B, d], what it predicts; carries no gradient.
  """

  terms: dict[str, jax.Array]
  codes: jax.Array
  residuals: jax.Array
  present: jax.Array
  quantized: dict[str, jax.Array]
  specific: dict[str, jax.Array]


# (quantized, specific, present) of each modality -> the sum of their CLUB bounds, this device's share.
Bound = Callable[[dict[str, jax.Array], dict[str, jax.Array], dict[str, jax.Array]], jax.Array]


def tokenizer_loss(
  model: Tokenizer,
  params: Any,
  batch: dict[str, Any],
  *,
  weights: LossWeights,
  quantized: jax.Array | bool = True,
  bound: Bound | None = None,
  own_loss: OwnLoss | None = None,
  key: jax.Array | None = None,
  axis_name: str | None = None,
) -> tuple[jax.Array, TokenizerOutput]:
  """The weighted losses of stage 1 on one batch.

  The reconstruction and quantization losses see a uniform sample of the catalogue; the contrast sees the items of
  packed training histories, each position's state against the item that follows it there.

  Args:
    model: the tokenizer.
    params: its parameters.
    batch: `items` [B], `features`, `present` of the catalogue sample; `history_items` [R, C], `history_features`
      (modality -> [R, C, D]), `history_present`, `segments` [R, C], `positions` [R, C] of whole packed histories.
    weights: the weight of each term.
    quantized: False trains on the latents themselves, before the codebooks exist; may be traced.
    bound: the CLUB bound between quantized and specific latents, its own network held fixed; None leaves it out.
    own_loss: of `CatalogueRows`, added as `weights.own` says; None is none.
    key: for dropout of activations and of specific latents; None means neither.
    axis_name: the mapped axis over which the batch is split, or None.

  Returns:
    (loss, `TokenizerOutput`); over several devices the loss is this device's share.

  Raises:
    InputError: if `own_loss` gives anything else than a number an item.
  """
  s = model.settings
  names, streams, training = s.names, s.streams, key is not None
  quantizer = make_quantizer(s)

  def run(method, *args, **kwargs):
    rngs = {"dropout": key} if training else None
    return apply(model, params, method, *args, rngs=rngs, **kwargs)

  def through_codebook(latents, *, levels=None):
    """The quantization of stacked streams, and straight-through codewords, or latents while there is no codebook.

    `levels` [B] says how many of each item's codewords, from the first, are passed on; None is all.
    """
    result = run("quantize", latents.values)
    codewords = result.quantized
    if levels is not None:
      kept = jnp.arange(s.num_levels, dtype=jnp.int32)[:, None] < levels[None]
      codewords = jnp.sum(jnp.where(kept[..., None], result.codewords, 0.0), axis=1)
    given = quantizer.bounded(latents.values)
    passed = straight_through(given, codewords)
    return result, jnp.where(quantized, passed, given)

  def mean_error(rebuilt):
    """Mean squared error over width, present rows and modalities."""
    total = jnp.zeros((), jnp.float32)
    for name in names:
      error = jnp.mean(jnp.square(rebuilt[name] - batch["features"][name]), axis=-1)
      total += masked_mean(error, batch["present"][name], axis_name=axis_name) / len(names)
    return total

  latents = run("latents", batch["items"], batch["features"], batch["present"])
  result, passed = through_codebook(latents)
  specific = run("specific", batch["features"])
  behaviour = {name: passed[streams.index(name)] for name in names}
  given = specific
  if key is not None and s.specific_dropout:
    kept = jax.random.bernoulli(
      jax.random.fold_in(key, 3), jnp.float32(1.0 - s.specific_dropout), (len(batch["items"]), 1)
    )
    given = {name: jnp.where(kept, value, 0.0) for name, value in specific.items()}
  reconstruction = mean_error(run("reconstruct", behaviour, given))
  nothing = jax.tree.map(jnp.zeros_like, specific)
  fused_reconstruction = mean_error(run("reconstruct", dict.fromkeys(names, passed[-1]), nothing))

  error = jax.vmap(quantizer.loss)(result)
  quantization = masked_mean(error.reshape(-1), latents.present.reshape(-1), axis_name=axis_name)
  quantization = jnp.where(quantized, quantization, 0.0)

  item_id = jnp.zeros((), jnp.float32)
  if "id" in streams:
    everyone = jnp.ones(len(batch["items"]), bool)
    squared = jnp.sum(jnp.square(latents.values[streams.index("id")]), axis=-1)
    item_id = masked_mean(squared, everyone, axis_name=axis_name)

  disentangle = jnp.zeros((), jnp.float32) if bound is None else bound(behaviour, specific, batch["present"])

  contrast, modality_contrast, accuracy = _contrast(run, through_codebook, batch, s, key=key, axis_name=axis_name)
  terms = {
    "reconstruction": reconstruction,
    "fused_reconstruction": fused_reconstruction,
    "quantization": quantization,
    "contrast": contrast,
    "modality_contrast": modality_contrast,
    "item_id": item_id,
    "disentangle": disentangle,
  }
  if own_loss is not None:
    parts = {"present": latents.present, "latents": latents.values, "quantized": passed, "codes": result.codes}
    by_stream = {name: dict(zip(streams, part, strict=True)) for name, part in parts.items()}
    rows = CatalogueRows(items=batch["items"], features=batch["features"], specific=specific, **by_stream)
    terms["own"] = _own(own_loss, rows, axis_name=axis_name)
  loss = sum((getattr(weights, name) * value for name, value in terms.items()), start=jnp.zeros((), jnp.float32))
  observed = jax.lax.stop_gradient((result.codes, result.residuals, latents.present, behaviour, specific))
  return loss, TokenizerOutput(terms | {"contrast_accuracy": accuracy}, *observed)


def _own(own_loss: OwnLoss, rows: CatalogueRows, *, axis_name: str | None) -> jax.Array:
  """The mean of a loss of one's own, this device's share."""
  values, shape = own_loss(rows), rows.items.shape
  if jnp.shape(values) != shape:
    raise InputError(
      f"config field tokenizer.own_loss: expected a number for each of {shape[0]} items, [{shape[0]}], got an array of"
      f" shape {list(jnp.shape(values))}"
    )
  return masked_mean(values, jnp.ones(shape, bool), axis_name=axis_name)


def _contrast(run, through_codebook, batch, settings, *, key, axis_name):
  """Sequence-to-item contrast against the fused vector, and against each modality's own."""
  streams, names = settings.streams, settings.names
  rows, columns = batch["history_items"].shape
  items = batch["history_items"].reshape(-1)
  features, present = (
    {name: value.reshape(rows * columns, *value.shape[2:]) for name, value in batch[part].items()}
    for part in ("history_features", "history_present")
  )
  latents = run("latents", items, features, present)
  levels = None
  if key is not None and settings.level_dropout and settings.num_levels > 1:
    dropped, number = (jax.random.fold_in(key, index) for index in (4, 5))
    prefix = jax.random.randint(number, items.shape, 1, settings.num_levels, jnp.int32)
    cut = jax.random.bernoulli(dropped, jnp.float32(settings.level_dropout), items.shape)
    levels = jnp.where(cut, prefix, settings.num_levels)
  _, passed = through_codebook(latents, levels=levels)
  temperature = jnp.float32(settings.temperature)
  vectors = passed[-1]
  if "id" in streams:
    vectors = vectors + latents.values[streams.index("id")]
  states = run(
    "history_states",
    vectors.reshape(rows, columns, -1),
    batch["segments"],
    batch["positions"],
    deterministic=key is None,
  ).reshape(rows * columns, -1)

  target, has_target = following(batch["segments"])
  contrast, aux = info_nce(
    states, vectors[target], items[target], has_target, temperature=temperature, axis_name=axis_name
  )
  modality = jnp.zeros((), jnp.float32)
  for name in names:
    known = has_target & present[name][target]
    stream = passed[streams.index(name)]
    value, _ = info_nce(states, stream[target], items[target], known, temperature=temperature, axis_name=axis_name)
    modality += value / len(names)
  return contrast, modality, aux["accuracy"]
