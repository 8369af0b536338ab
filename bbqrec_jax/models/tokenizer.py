"""Stage 1, the behaviour-bind tokenizer: from item features and histories to one shared residual codebook."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bbqrec_jax.models.apply import apply
from bbqrec_jax.models.backbones import CausalBackbone
from bbqrec_jax.models.encoders import MLP
from bbqrec_jax.ops import quantize
from bbqrec_jax.ops.contrastive import info_nce
from bbqrec_jax.ops.reduction import masked_mean


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
  """Shapes of the tokenizer.

  Attributes:
    modalities: (name, feature width) of each modality, in order.
    num_items: N.
    code_width: d.
    num_levels: L.
    num_codes: K.
    hidden: widths of the encoders between D and d; the decoders mirror them.
    item_id: whether items have a learnable ID vector (the paper's z_ID).
    normalize: whether the modalities' and the fused latents are layer-normalised before they are quantized.
    history_layers: layers of the small causal transformer of the sequence-to-item contrast.
    history_heads: its heads.
    max_length: the longest history it tells places apart in.
    dropout: its dropout rate.
  """

  modalities: tuple[tuple[str, int], ...]
  num_items: int
  code_width: int = 32
  num_levels: int = 4
  num_codes: int = 256
  hidden: tuple[int, ...] = (512, 256)
  item_id: bool = True
  normalize: bool = True
  history_layers: int = 1
  history_heads: int = 2
  max_length: int = 50
  dropout: float = 0.1

  @property
  def streams(self) -> tuple[str, ...]:
    """Names of what the codebooks quantize, in order: each modality, "id" if there is one, and "fused"."""
    return tuple(name for name, _ in self.modalities) + (("id",) if self.item_id else ()) + ("fused",)


class Latents(NamedTuple):
  """What is quantized, one row a stream (see `TokenizerSettings.streams`).

  Attributes:
    values: [S, B, d].
    present: [S, B] bool; False where an item lacks the modality.
  """

  values: jax.Array
  present: jax.Array


class Tokenizer(nn.Module):
  """Dual encoders a modality, a learnable item ID, one residual codebook shared by all streams (the paper's part 1-3).

  Attributes:
    settings: the shapes.
  """

  settings: TokenizerSettings

  def setup(self):
    """Makes the parameters and submodules."""
    s = self.settings
    self.behaviour_encoders = {name: MLP((*s.hidden, s.code_width)) for name, _ in s.modalities}
    self.specific_encoders = {name: MLP((*s.hidden, s.code_width)) for name, _ in s.modalities}
    # Bounded specific latents: what a decoder may lean on must not grow without limit (this project's choice).
    self.specific_norms = {name: nn.LayerNorm(use_bias=False, use_scale=False) for name, _ in s.modalities}
    # Streams of one scale can share codewords; otherwise each settles on codewords of its own (this project's choice).
    self.latent_norm = nn.LayerNorm(use_bias=False, use_scale=False)
    self.decoders = {name: MLP((*reversed(s.hidden), width)) for name, width in s.modalities}
    if s.item_id:
      self.item_embedding = nn.Embed(s.num_items, s.code_width, embedding_init=nn.initializers.normal(0.02))
    self.codebooks = self.param(
      "codebooks", nn.initializers.normal(s.code_width**-0.5), (s.num_levels, s.num_codes, s.code_width)
    )
    self.history = CausalBackbone(
      s.history_layers, s.history_heads, 4 * s.code_width, s.max_length, s.dropout, name="history"
    )
    self.query = nn.Dense(s.code_width, name="query")

  def latents(self, items: jax.Array, features: dict[str, jax.Array], present: dict[str, jax.Array]) -> Latents:
    """The latents of every stream: b_m of each modality, z_id, and z = mean of the present b_m + z_id.

    Args:
      items: [B] int.
      features: modality -> [B, D] standardised features.
      present: modality -> [B] bool.

    Returns:
      `Latents` of S streams.
    """
    names = [name for name, _ in self.settings.modalities]
    scale = self.latent_norm if self.settings.normalize else lambda x: x
    values = [scale(self.behaviour_encoders[name](features[name])) for name in names]
    masks = [present[name] for name in names]
    weights = jnp.stack(masks).astype(jnp.float32)[..., None]
    fused = jnp.sum(jnp.stack(values) * weights, axis=0) / jnp.maximum(jnp.sum(weights, axis=0), 1.0)
    everywhere = jnp.ones(items.shape, bool)
    if self.settings.item_id:
      # Never scaled up: an ID starts as small noise, and would take the codebook from what the features say.
      item_id = self.item_embedding(items)
      fused = fused + item_id
      values.append(item_id)
      masks.append(everywhere)
    return Latents(jnp.stack([*values, scale(fused)]), jnp.stack([*masks, everywhere]))

  def specific(self, features: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The modality-specific latents s_m [B, d], each row at zero mean and unit variance."""
    return {
      name: self.specific_norms[name](self.specific_encoders[name](features[name]))
      for name, _ in self.settings.modalities
    }

  def reconstruct(self, quantized: dict[str, jax.Array], specific: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """decoder_m(concat(q_m, s_m)), [B, D] for each modality."""
    return {
      name: self.decoders[name](jnp.concatenate([quantized[name], specific[name]], axis=-1))
      for name, _ in self.settings.modalities
    }

  def history_states(
    self, vectors: jax.Array, segments: jax.Array, positions: jax.Array, *, deterministic: bool
  ) -> jax.Array:
    """The state u at each position of each history: [R, C, d] -> [R, C, d]."""
    return self.query(self.history(vectors, segments, positions, deterministic=deterministic))

  def quantize(self, values: jax.Array) -> quantize.ResidualQuantization:
    """Quantizes rows [B, d] with the shared codebooks."""
    return quantize.residual_quantize(values, self.codebooks)

  def __call__(self, batch: dict[str, Any]) -> jax.Array:
    """Touches every parameter, for `init`; training calls `tokenizer_loss`."""
    latents = self.latents(batch["items"], batch["features"], batch["present"])
    result = self.quantize(latents.values[-1])
    names = [name for name, _ in self.settings.modalities]
    self.reconstruct({name: result.quantized for name in names}, self.specific(batch["features"]))
    return self.history_states(
      result.quantized[None], jnp.ones((1, len(batch["items"])), jnp.int32),
      jnp.arange(len(batch["items"]))[None], deterministic=True,
    )  # fmt: skip


class LossWeights(NamedTuple):
  """Weight of each loss of stage 1; the sum of the weighted terms is minimised."""

  reconstruction: float | jax.Array = 1.0
  quantization: float | jax.Array = 1.0
  contrast: float | jax.Array = 0.1
  modality_contrast: float | jax.Array = 0.1
  disentangle: float | jax.Array = 0.01


class TokenizerOutput(NamedTuple):
  """What a step needs besides the loss.

  Attributes:
    terms: the unweighted losses and the contrast's accuracy, each this device's share.
    counts: [L, K] how often the rows of the batch chose each code, over all streams.
    residuals: [L, S, B, d] what each level was given.
    valid: [S, B] bool, the rows of `residuals` whose stream is present.
    quantized: modality -> [B, d], what the CLUB bound predicts from; carries no gradient.
    specific: modality -> [B, d], what it predicts; carries no gradient.
  """

  terms: dict[str, jax.Array]
  counts: jax.Array
  residuals: jax.Array
  valid: jax.Array
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
  commitment: float = 0.25,
  temperature: float = 0.07,
  bound: Bound | None = None,
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
    commitment: beta of the quantization loss.
    temperature: of the contrast.
    bound: the CLUB bound between quantized and specific latents, its own network held fixed; None leaves it out.
    key: for dropout; None means none.
    axis_name: the mapped axis over which the batch is split, or None.

  Returns:
    (loss, `TokenizerOutput`); over several devices the loss is this device's share.
  """
  names = [name for name, _ in model.settings.modalities]
  streams = model.settings.streams

  def run(method, *args, **kwargs):
    rngs = None if key is None else {"dropout": key}
    return apply(model, params, method, *args, rngs=rngs, **kwargs)

  def through_codebook(values):
    """Straight-through codewords of stacked streams [S, B, d], or the latents while there is no codebook."""
    flat = values.reshape(-1, values.shape[-1])
    result = run("quantize", flat)
    passed = jnp.where(quantized, quantize.straight_through(flat, result.quantized), flat)
    return result, passed.reshape(values.shape)

  latents = run("latents", batch["items"], batch["features"], batch["present"])
  result, passed = through_codebook(latents.values)
  valid = latents.present.reshape(-1)

  specific = run("specific", batch["features"])
  behaviour = {name: passed[streams.index(name)] for name in names}
  rebuilt = run("reconstruct", behaviour, specific)
  reconstruction = jnp.asarray(0.0)
  for name in names:
    error = jnp.mean(jnp.square(rebuilt[name] - batch["features"][name]), axis=-1)
    reconstruction += masked_mean(error, batch["present"][name], axis_name=axis_name) / len(names)

  error = quantize.quantization_error(result, commitment=commitment)
  quantization = jnp.where(quantized, masked_mean(error, valid, axis_name=axis_name), 0.0)

  disentangle = jnp.asarray(0.0) if bound is None else bound(behaviour, specific, batch["present"])

  contrast, modality_contrast, accuracy = _contrast(
    run, through_codebook, batch, streams, names, temperature=temperature, training=key is not None, axis_name=axis_name
  )
  loss = (
    weights.reconstruction * reconstruction
    + weights.quantization * quantization
    + weights.contrast * contrast
    + weights.modality_contrast * modality_contrast
    + weights.disentangle * disentangle
  )
  terms = {
    "reconstruction": reconstruction,
    "quantization": quantization,
    "contrast": contrast,
    "modality_contrast": modality_contrast,
    "disentangle": disentangle,
    "contrast_accuracy": accuracy,
  }
  counts = quantize.code_counts(result.codes, model.settings.num_codes, valid=valid)
  residuals = result.residuals.reshape(-1, *latents.values.shape)
  observed = jax.lax.stop_gradient((residuals, latents.present, behaviour, specific))
  return loss, TokenizerOutput(terms, counts, *observed)


def _contrast(run, through_codebook, batch, streams, names, *, temperature, training, axis_name):
  """Sequence-to-item contrast against the fused vector, and against each modality's own."""
  rows, columns = batch["history_items"].shape
  items = batch["history_items"].reshape(-1)
  features, present = (
    {name: value.reshape(rows * columns, *value.shape[2:]) for name, value in batch[part].items()}
    for part in ("history_features", "history_present")
  )
  latents = run("latents", items, features, present)
  _, passed = through_codebook(latents.values)
  vectors = passed[-1]
  if "id" in streams:
    vectors = vectors + latents.values[streams.index("id")]
  states = run(
    "history_states",
    vectors.reshape(rows, columns, -1),
    batch["segments"],
    batch["positions"],
    deterministic=not training,
  ).reshape(rows * columns, -1)

  # Position t's target stands at t + 1 where that is the same history.
  following = jnp.roll(jnp.arange(rows * columns).reshape(rows, columns), -1, axis=1).reshape(-1)
  segments = batch["segments"]
  has_target = ((segments > 0) & (segments == jnp.roll(segments, -1, axis=1))).at[:, -1].set(False).reshape(-1)

  contrast, aux = info_nce(
    states, vectors[following], items[following], has_target, temperature=temperature, axis_name=axis_name
  )
  modality = jnp.asarray(0.0)
  for name in names:
    known = has_target & present[name][following]
    stream = passed[streams.index(name)]
    value, _ = info_nce(
      states, stream[following], items[following], known, temperature=temperature, axis_name=axis_name
    )
    modality += value / len(names)
  return contrast, modality, aux["accuracy"]
