"""The tokenizer's parts are checked before anything is trained: that they are there, fit the settings, and work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from bbqrec_jax.errors import InputError
from bbqrec_jax.ops.quantize import decode
from bbqrec_jax.tokenizer.encoders import encoder_class
from bbqrec_jax.tokenizer.losses import tokenizer_loss
from bbqrec_jax.tokenizer.model import Tokenizer
from bbqrec_jax.tokenizer.quantizers import Quantizer, make_quantizer
from bbqrec_jax.tokenizer.settings import TokenizerSettings

PARTS = ("quantizer", "encoder", "contrast", "own_loss")  # Settings that may name code of the user's.


def check_parts(settings: TokenizerSettings, *, field: str) -> None:
  """Refuses settings that their parts do not work with; `field` is what a message puts before their names.

  Raises:
    InputError: if there are some, or a class is none of its kind.
  """
  quantizer = make_quantizer(settings)
  encoder_class(settings)
  if settings.own_loss and not quantizer.trained:
    raise InputError(
      f"{field}own_loss: nothing learns with {field.split()[-1]}quantizer = {settings.quantizer!r}; leave it empty, or"
      " choose another quantizer"
    )
  quantizer.check(field)


def try_parts(settings: TokenizerSettings, *, batch_items: int) -> None:
  """Tries custom parts as training would use them: the quantizer on a few latents, the others on shapes alone.

  Args:
    settings: of the tokenizer, with the shapes of the data.
    batch_items: items of the catalogue per batch.

  Raises:
    InputError: if one fails, or gives something else than it should.
  """
  custom = [f"{name} = {getattr(settings, name)!r}" for name in PARTS if ":" in getattr(settings, name)]
  if not custom:
    return
  try:
    quantizer = make_quantizer(settings)
    wrong = _quantizer_breaks(quantizer)
    if not wrong and quantizer.trained:
      wrong = _shapes_break(Tokenizer(settings), batch_items)
  except InputError:
    raise
  except Exception as error:  # It may be anybody's code.
    wrong = f"{type(error).__name__}: {error}"
  if wrong:
    raise InputError(f"config field tokenizer.{', '.join(custom)} breaks the contract of docs/parts.md: {wrong}")


def _quantizer_breaks(quantizer: Quantizer) -> str:
  """What of the contract a quantizer breaks, on a few random latents; "" if nothing."""
  _, levels, num_codes, width = quantizer.codebook_shape
  expected: dict[str, tuple[int, ...]] = {"codes": (8, levels), "quantized": (8, width)}
  expected |= {name: (levels, 8, width) for name in ("residuals", "codewords")}
  rng = np.random.default_rng(0)
  fixed = quantizer.fixed()
  codebooks = jnp.asarray(rng.normal(size=quantizer.codebook_shape) if fixed is None else fixed, jnp.float32)[0]
  result = jax.jit(quantizer.encode)(jnp.asarray(rng.normal(size=(8, width)), jnp.float32), codebooks)
  came = {name: tuple(getattr(result, name).shape) for name in expected}
  if came != expected:
    return f"expected arrays of shapes {expected}, got {came}"
  if int(jnp.min(result.codes)) < 0 or int(jnp.max(result.codes)) >= num_codes:
    return f"expected codes in 0..{num_codes - 1}, got {int(jnp.min(result.codes))}..{int(jnp.max(result.codes))}"
  if not np.allclose(result.quantized, jax.jit(decode)(result.codes, codebooks), atol=1e-4):
    return "expected vectors that are the sums of the codewords which the codes name, got others"
  return ""


def _shapes_break(model: Tokenizer, batch_items: int) -> str:
  """What of their contracts the other parts break, by the shapes of a batch and its losses; "" if nothing."""
  settings = model.settings

  def rows(*shape):
    features = {name: jax.ShapeDtypeStruct((*shape, width), jnp.float32) for name, width in settings.modalities}
    return jax.ShapeDtypeStruct(shape, jnp.int32), features, dict.fromkeys(features, jax.ShapeDtypeStruct(shape, bool))

  sample, histories = rows(batch_items), rows(1, settings.max_length)
  batch = dict(zip(("items", "features", "present"), sample, strict=True))
  params = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
  batch |= dict(zip(("history_items", "history_features", "history_present"), histories, strict=True))
  batch |= dict.fromkeys(("segments", "positions"), histories[0])
  loss, output = jax.eval_shape(functools.partial(tokenizer_loss, model), params, batch)
  if loss.shape:
    return f"expected a loss that is one number, got an array of shape {list(loss.shape)}"
  for name, latent in output.specific.items():
    if latent.shape != (batch_items, settings.code_width):
      return f"expected latents {[batch_items, settings.code_width]} of modality {name!r}, got {list(latent.shape)}"
  return ""
