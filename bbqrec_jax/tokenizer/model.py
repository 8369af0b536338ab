"""The model of stage 1: encoders, fusion, codebooks, decoders and the history transformer of the contrast."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bbqrec_jax.layers.dense import Dense
from bbqrec_jax.layers.transformer import CausalBackbone
from bbqrec_jax.ops.quantize import ResidualQuantization
from bbqrec_jax.tokenizer.encoders import MLP, encoder_class
from bbqrec_jax.tokenizer.quantizers import make_quantizer
from bbqrec_jax.tokenizer.settings import TokenizerSettings


def by_codebook(settings: TokenizerSettings, rows: jax.Array) -> jax.Array:
  """Sorts rows by the codebook that serves them: [S, L, B, ...] -> [G, L, R, ...] (see `codebook_shape`)."""
  rest = rows.shape[3:]
  if settings.codebooks == "per_stream":
    return rows
  return jnp.swapaxes(rows, 0, 1).reshape(1, rows.shape[1], -1, *rest)


def codebooks_of(settings: TokenizerSettings, params: Any) -> np.ndarray:
  """The codebooks [G, L, K, d] of a tokenizer with (fetched) parameters, learned or not."""
  fixed = make_quantizer(settings).fixed()
  return np.asarray(params["codebooks"]) if fixed is None else fixed


def stream_codebooks(settings: TokenizerSettings, codebooks: jax.Array) -> jax.Array:
  """The codebooks of every stream and level: [G, L, K, d] -> [S, L, K, d]."""
  shape = (len(settings.streams), settings.num_levels, *codebooks.shape[2:])
  return jnp.broadcast_to(codebooks, shape)


class Latents(NamedTuple):
  """What is quantized, one row per stream (see `TokenizerSettings.streams`).

  Attributes:
    values: [S, B, d]; where an item lacks a modality, its fused latent stands in.
    present: [S, B] bool; False where an item lacks the modality.
  """

  values: jax.Array
  present: jax.Array


def _identity(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
  """An initialiser."""
  del key
  return jnp.eye(shape[0], shape[1], dtype=dtype)


def history_reader(s: TokenizerSettings) -> tuple[CausalBackbone, nn.Dense]:
  """The small causal transformer of the contrast and what points its states at items, for a module's `setup`."""
  history = CausalBackbone(s.history_layers, s.history_heads, 4 * s.code_width, s.max_length, s.dropout, name="history")
  # The identity at first: a history points at items like its own, and items that follow one another come together.
  return history, Dense(s.code_width, kernel_init=_identity, name="query")


class Tokenizer(nn.Module):
  """Dual encoders per modality, a learnable item ID, and residual codebooks shared by all streams.

  Attributes:
    settings: of the stage.
  """

  settings: TokenizerSettings

  def setup(self):
    """Makes the parameters and submodules."""
    s = self.settings
    encoder = functools.partial(encoder_class(s), (*s.hidden, s.code_width))
    self.behaviour_encoders = {name: encoder() for name, _ in s.modalities}
    self.specific_encoders = {name: encoder() for name, _ in s.modalities}
    # Bounded specific latents: what a decoder may lean on must not grow without limit (this project's choice).
    self.specific_norms = {name: nn.LayerNorm(use_bias=False, use_scale=False) for name, _ in s.modalities}
    # Streams of one scale can share codewords; otherwise each settles on codewords of its own (this project's choice).
    self.latent_norm = nn.LayerNorm(use_bias=False, use_scale=False)
    self.decoders = {name: MLP((*reversed(s.hidden), width)) for name, width in s.modalities}
    if s.item_id != "none":
      self.item_embedding = nn.Embed(s.num_items, s.code_width, embedding_init=nn.initializers.normal(0.02))
    self.quantizer = make_quantizer(s)
    fixed = self.quantizer.fixed()
    if fixed is None:
      start = nn.initializers.normal(s.code_width**-0.5)
      self.codebooks = self.param("codebooks", start, self.quantizer.codebook_shape, jnp.float32)
    else:
      self.codebooks = jnp.asarray(fixed)
    self.history, self.query = history_reader(s)

  def latents(self, items: jax.Array, features: dict[str, jax.Array], present: dict[str, jax.Array]) -> Latents:
    """The latents of every stream: b_m of each modality, z_id, and z = mean of the present b_m + z_id.

    Args:
      items: [B] int.
      features: modality -> [B, D] standardised features.
      present: modality -> [B] bool.

    Returns:
      `Latents` of S streams.
    """
    return self.fuse(self.item_embedding(items) if self.settings.item_id != "none" else None, features, present)

  def fuse(self, item_id: jax.Array | None, features: dict[str, jax.Array], present: dict[str, jax.Array]) -> Latents:
    """As `latents`, from the ID vectors [B, d] themselves; None where the settings have none."""
    names = self.settings.names
    values = [self.latent_norm(self.behaviour_encoders[name](features[name])) for name in names]
    masks = [present[name] for name in names]
    weights = jnp.stack(masks).astype(jnp.float32)[..., None]
    fused = jnp.sum(jnp.stack(values) * weights, axis=0) / jnp.maximum(jnp.sum(weights, axis=0), 1.0)
    everywhere = jnp.ones(masks[0].shape, bool)
    if item_id is not None:
      # Never scaled up: an ID starts as small noise, and would take the codebook from what the features say.
      fused = fused + item_id
      values.append(item_id)
      masks.append(everywhere)
    stacked, here = jnp.stack([*values, self.latent_norm(fused)]), jnp.stack([*masks, everywhere])
    return Latents(jnp.where(here[..., None], stacked, stacked[-1:]), here)

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

  def quantize(self, values: jax.Array) -> ResidualQuantization:
    """Quantizes stacked streams, each with its codebooks.

    Args:
      values: [S, B, d].

    Returns:
      A `ResidualQuantization` whose arrays have a leading S: [S, B, L], [S, B, d] and twice [S, L, B, d].
    """
    s = self.settings
    streams, batch, width = values.shape
    sets = self.codebooks.shape[0]
    result = jax.vmap(self.quantizer.encode)(values.reshape(sets, -1, width), self.codebooks)

    def by_stream(array):
      """[G, L, R, d] -> [S, L, B, d]."""
      array = array.reshape(sets, s.num_levels, streams // sets, batch, width)
      return jnp.swapaxes(array, 1, 2).reshape(streams, s.num_levels, batch, width)

    return ResidualQuantization(
      result.codes.reshape(streams, batch, s.num_levels),
      result.quantized.reshape(streams, batch, width),
      by_stream(result.residuals),
      by_stream(result.codewords),
    )

  def __call__(self, batch: dict[str, Any]) -> jax.Array:
    """Touches every parameter, for `init`; training calls `tokenizer_loss`."""
    latents = self.latents(batch["items"], batch["features"], batch["present"])
    fused = self.quantize(latents.values).quantized[-1]
    self.reconstruct(dict.fromkeys(self.settings.names, fused), self.specific(batch["features"]))
    return self.history_states(
      fused[None], jnp.ones((1, len(batch["items"])), jnp.int32),
      jnp.arange(len(batch["items"]), dtype=jnp.int32)[None], deterministic=True,
    )  # fmt: skip
