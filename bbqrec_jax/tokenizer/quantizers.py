"""Quantizers: latents to codes, and codes to vectors.

A code names a codeword, and the quantized latent is the sum of the codewords that its codes name. So the codebooks,
which an artefact holds, suffice to turn codes into the vectors that items are compared by.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bbqrec_jax.data.feature_store import FeatureStore
from bbqrec_jax.errors import InputError
from bbqrec_jax.ops.kmeans import residual_kmeans
from bbqrec_jax.ops.quantize import (
  ResidualQuantization,
  channel_levels,
  finite_code,
  finite_codebook,
  quantization_error,
  residual_quantize,
)
from bbqrec_jax.tokenizer.kmeans import kmeans_codebooks
from bbqrec_jax.tokenizer.settings import QUANTIZERS, TokenizerSettings
from bbqrec_jax.utils.named import part


class Quantizer:
  """The contract of a quantizer; a custom one is a subclass, named as "module:Class" in the setting `quantizer`.

  Attributes:
    trained: whether it quantizes the latents of encoders that are trained; otherwise it quantizes the features
      themselves, and there is no training (see `kmeans.content_latents`).
    settings: of the tokenizer.
  """

  trained = True

  def __init__(self, settings: TokenizerSettings):
    """Takes the settings; of the shapes of the data, `modalities` may be empty while a config is checked."""
    self.settings = settings

  def check(self, field: str) -> None:
    """Refuses settings that it does not work with; `field` is what a message calls them by, before their name.

    Raises:
      InputError: if there are some.
    """

  @property
  def shared(self) -> bool:
    """Whether all streams share one code space: only then can vectors of different streams be compared."""
    return self.trained and self.settings.codebooks == "shared"

  @property
  def codebook_shape(self) -> tuple[int, int, int, int]:
    """[G, L, K, d] as `TokenizerSettings.codebook_shape`; where features are quantized, d is their width together."""
    width = self.settings.code_width if self.trained else sum(width for _, width in self.settings.modalities)
    return *self.settings.codebook_shape[:3], width

  def fixed(self) -> np.ndarray | None:
    """The codebooks [G, L, K, d] of a quantizer that learns none; None: they are parameters of the tokenizer."""
    return None

  def bounded(self, latents: jax.Array) -> jax.Array:
    """Maps latents [..., d] to the range of the codewords; the straight-through gradient is taken of the result."""
    return latents

  def fit(self, latents: np.ndarray, present: np.ndarray, *, seed: int) -> np.ndarray:
    """Codebooks for the latents at the end of the warm-up: residual k-means of what is present, unless overridden.

    Args:
      latents: [S, N, d].
      present: [S, N] bool.
      seed: of everything random.

    Returns:
      [G, L, K, d] float32.
    """
    s = self.settings
    sets, levels, num_codes, width = self.codebook_shape
    rows, here = latents.reshape(sets, -1, width), present.reshape(sets, -1).astype(np.float32)
    return np.stack([
      residual_kmeans(
        seed, rows[number], num_levels=levels, num_codes=num_codes, weights=here[number],
        iterations=s.kmeans_iterations,
      )
      for number in range(sets)
    ])  # fmt: skip

  def fit_features(self, store: FeatureStore, *, seed: int) -> np.ndarray:
    """Codebooks [S, L, K, d] for the features of all items, where nothing is trained."""
    raise NotImplementedError

  def encode(self, latents: jax.Array, codebooks: jax.Array) -> ResidualQuantization:
    """Codes [B, L] of latents [B, d] by codebooks [L, K, d], and the codewords that they name."""
    raise NotImplementedError

  def loss(self, result: ResidualQuantization) -> jax.Array:
    """The quantization loss of B encoded rows, [B]."""
    return jnp.zeros(result.codes.shape[0], jnp.float32)


class ResidualQuantizer(Quantizer):
  """RQ-VAE (Lee et al., 2022): the nearest codeword at each level, of what the levels before it left over."""

  def encode(self, latents: jax.Array, codebooks: jax.Array) -> ResidualQuantization:
    """See `Quantizer`."""
    return residual_quantize(latents, codebooks)

  def loss(self, result: ResidualQuantization) -> jax.Array:
    """See `quantization_error`."""
    return quantization_error(result, commitment=self.settings.commitment)


class ResidualKMeans(Quantizer):
  """Residual k-means of the features themselves: no gradient, no behaviour; the cheap baseline."""

  trained = False

  def fit_features(self, store: FeatureStore, *, seed: int) -> np.ndarray:
    """See `kmeans_codebooks`."""
    return kmeans_codebooks(self.settings, store, seed=seed)

  def encode(self, latents: jax.Array, codebooks: jax.Array) -> ResidualQuantization:
    """See `Quantizer`."""
    return residual_quantize(latents, codebooks)


class FiniteScalarQuantizer(Quantizer):
  """FSQ (Mentzer et al., 2023): each channel of the bounded latent is rounded to one of a few values.

  Each of the L levels has d / L channels of its own, with K combinations of values (a product over levels is this
  project's choice). There are no codebooks to learn, nothing to revive, and no loss; all streams share the one grid.
  """

  shared = True

  def check(self, field: str) -> None:
    """Refuses a width that cannot be shared out, and codebooks per stream.

    Raises:
      InputError: if one of them is asked for.
    """
    s = self.settings
    if s.code_width % s.num_levels:
      raise InputError(
        f"{field}code_width = {s.code_width} must be a multiple of num_levels = {s.num_levels} where quantizer = 'fsq'"
      )
    if s.codebooks != "shared":
      raise InputError(f"{field}codebooks = {s.codebooks!r}: with quantizer = 'fsq' all streams share one grid: shared")

  @property
  def _levels(self) -> tuple[int, ...]:
    return channel_levels(self.settings.num_codes, self.settings.code_width // self.settings.num_levels)

  def fixed(self) -> np.ndarray:
    """The grid of each level in its own channels, zero in the others: [1, L, K, d]."""
    levels, grid = self.settings.num_levels, finite_codebook(self._levels)
    blocks = np.einsum("ml,kc->mklc", np.eye(levels, dtype=np.float32), grid)
    return blocks.reshape(1, levels, len(grid), self.settings.code_width)

  def bounded(self, latents: jax.Array) -> jax.Array:
    """Each channel between -1 and 1."""
    return jnp.tanh(latents)

  def encode(self, latents: jax.Array, codebooks: jax.Array) -> ResidualQuantization:
    """See `Quantizer`."""
    z = self.bounded(latents)
    codes = [finite_code(channels, self._levels) for channels in jnp.split(z, self.settings.num_levels, axis=-1)]
    codewords = jnp.stack([codebook[code] for codebook, code in zip(codebooks, codes, strict=True)])
    before = jnp.cumsum(codewords, axis=0) - codewords
    return ResidualQuantization(jnp.stack(codes, axis=-1), jnp.sum(codewords, axis=0), z[None] - before, codewords)


def make_quantizer(settings: TokenizerSettings) -> Quantizer:
  """What the setting `quantizer` names, made of the settings.

  Raises:
    InputError: if it names no subclass of `Quantizer`.
  """
  return part("tokenizer.quantizer", settings.quantizer, QUANTIZERS, base=Quantizer)(settings)
