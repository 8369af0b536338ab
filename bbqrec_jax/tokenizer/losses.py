"""The losses of stage 1, which bind the tokenizer's codes to content and to behaviour."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bbqrec_jax.errors import InputError
from bbqrec_jax.layers.apply import apply
from bbqrec_jax.ops.contrastive import following
from bbqrec_jax.ops.quantize import straight_through
from bbqrec_jax.ops.reduction import masked_mean
from bbqrec_jax.tokenizer.model import Tokenizer
from bbqrec_jax.tokenizer.quantizers import make_quantizer
from bbqrec_jax.tokenizer.settings import CONTRASTS, TokenizerSettings
from bbqrec_jax.utils.named import part


class CatalogueRows(NamedTuple):
  """What a custom loss is given: B items of the catalogue, and what the tokenizer makes of them.

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


# A custom loss: [B], a number per item. Its mean over the items of all devices is added to the loss.
OwnLoss = Callable[[CatalogueRows], jax.Array]


def find_own_loss(settings: TokenizerSettings) -> OwnLoss | None:
  """The function that the setting `own_loss` names; None for "".

  Raises:
    InputError: if it names none.
  """
  return part("tokenizer.own_loss", settings.own_loss, {}) if settings.own_loss else None


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
  quantized: jax.Array | bool = True,
  temperature: jax.Array | None = None,
  bound: Bound | None = None,
  key: jax.Array | None = None,
  axis_name: str | None = None,
) -> tuple[jax.Array, TokenizerOutput]:
  """The weighted losses of stage 1 on one batch.

  The reconstruction and quantization losses see a uniform sample of the catalogue; the contrast sees the items of
  packed training histories, each position's state against the item that follows it there.

  Args:
    model: the tokenizer; its settings have the weight of each loss.
    params: its parameters.
    batch: `items` [B], `features`, `present` of the catalogue sample; `history_items` [R, C], `history_features`
      (modality -> [R, C, D]), `history_present`, `segments` [R, C], `positions` [R, C] of whole packed histories.
    quantized: False trains on the latents themselves, before the codebooks exist; may be traced.
    temperature: of the contrast; None is the settings'.
    bound: the CLUB bound between quantized and specific latents, its own network held fixed; None leaves it out.
    key: for dropout of activations and of specific latents; None means neither.
    axis_name: the mapped axis over which the batch is split, or None.

  Returns:
    (loss, `TokenizerOutput`); over several devices the loss is this device's share.

  Raises:
    InputError: if the custom loss gives anything else than a number per item.
  """
  s = model.settings
  names, streams, training = s.names, s.streams, key is not None
  quantizer, own_loss = make_quantizer(s), find_own_loss(s)

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

  temperature = jnp.float32(s.temperature) if temperature is None else temperature
  contrast, modality_contrast, accuracy = _contrast(
    run, through_codebook, batch, s, temperature=temperature, key=key, axis_name=axis_name
  )
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
  loss = sum((getattr(s.weights, name) * value for name, value in terms.items()), start=jnp.zeros((), jnp.float32))
  observed = jax.lax.stop_gradient((result.codes, result.residuals, latents.present, behaviour, specific))
  return loss, TokenizerOutput(terms | {"contrast_accuracy": accuracy}, *observed)


def _own(own_loss: OwnLoss, rows: CatalogueRows, *, axis_name: str | None) -> jax.Array:
  """The mean of a custom loss, this device's share."""
  values, shape = own_loss(rows), rows.items.shape
  if jnp.shape(values) != shape:
    raise InputError(
      f"config field tokenizer.own_loss: expected a number per item, {list(shape)}, got an array of shape"
      f" {list(jnp.shape(values))}"
    )
  return masked_mean(values, jnp.ones(shape, bool), axis_name=axis_name)


def _contrast(run, through_codebook, batch, settings, *, temperature, key, axis_name):
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
  loss = part("tokenizer.contrast", settings.contrast, CONTRASTS)
  loss = functools.partial(loss, temperature=temperature, axis_name=axis_name)
  contrast, aux = loss(states, vectors[target], items[target], has_target)
  modality = jnp.zeros((), jnp.float32)
  for name in names:
    known = has_target & present[name][target]
    value, _ = loss(states, passed[streams.index(name)][target], items[target], known)
    modality += value / len(names)
  return contrast, modality, aux["accuracy"]
