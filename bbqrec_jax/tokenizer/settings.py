"""The settings of stage 1, and the shapes derived from them and from the data."""

import dataclasses
from typing import Any

from bbqrec_jax.errors import InputError
from bbqrec_jax.training.settings import OptimizerSettings
from bbqrec_jax.utils.settings import derived, from_config, section, setting

_LARGEST = 2**31 - 1  # The longest that an axis of an array may be.

# Parts by name: classes, and of the contrast a function.
QUANTIZERS = {
  "rq_vae": "bbqrec_jax.tokenizer.quantizers:ResidualQuantizer",
  "rq_kmeans": "bbqrec_jax.tokenizer.quantizers:ResidualKMeans",
  "fsq": "bbqrec_jax.tokenizer.quantizers:FiniteScalarQuantizer",
}
ENCODERS = {"mlp": "bbqrec_jax.tokenizer.encoders:MLP"}
CONTRASTS = {"info_nce": "bbqrec_jax.ops.contrastive:info_nce"}


@dataclasses.dataclass(frozen=True)
class LossWeights:
  """Weight of each loss of stage 1; the sum of the weighted terms is minimised."""

  reconstruction: float = setting(
    1.0, "Weight of reconstructing a modality's features from its quantized and its specific latent."
  )
  fused_reconstruction: float = setting(
    1.0, "Weight of reconstructing every modality's features from the fused codes alone."
  )
  quantization: float = setting(1.0, "Weight of the distance between latents and their codewords.")
  contrast: float = setting(2.0, "State of the history against the fused vector of the next item.")
  modality_contrast: float = setting(1.0, "The same state against each modality's vector of the next item.")
  item_id: float = setting(0.05, "Mean squared norm of the item IDs: they say no more than behaviour needs them to.")
  disentangle: float = setting(
    0.01, "CLUB bound between each modality's quantized and specific latents; 0 leaves it out."
  )
  own: float = setting(1.0, "Weight of own_loss.")


@dataclasses.dataclass(frozen=True)
class ClubSettings:
  """How the CLUB bound is fitted and taken."""

  steps: int = setting(5, "Likelihood steps of its network per batch.")
  learning_rate: float = setting(1e-3, "Learning rate of the CLUB network.")


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
  """The tokenizer: its shape, its losses, its training."""

  modalities: tuple[tuple[str, int], ...] = derived((), "(name, feature width) of each modality, in order.")
  num_items: int = derived(0, "N: items of the catalogue.")
  code_width: int = setting(32, "d: width of latents and codewords.", most=_LARGEST)
  num_levels: int = setting(4, "L: codes in a semantic ID.", most=100)
  num_codes: int = setting(256, "K: codewords per level.", most=_LARGEST)
  hidden: tuple[int, ...] = setting((512, 256), "Encoder widths between the features and d; decoders mirror them.")
  artefact: str = setting("", "Folder of a tokenizer trained before (a run's tokenizer/), to use it and train none.")
  quantizer: str = setting(
    "rq_vae",
    "Learned residual codebooks; residual k-means of the features themselves, where nothing is learned; or"
    " finite scalar quantization, without codebooks.",
    parts=QUANTIZERS,
  )
  encoder: str = setting(
    "mlp", "Encoder of a modality's features, made twice: behaviour-aligned and modality-specific.", parts=ENCODERS
  )
  contrast: str = setting(
    "info_nce", "Contrast of a history's state with its next item, against those of others.", parts=CONTRASTS
  )
  codebooks: str = setting(
    "shared", "Shared by all streams (the paper's), or one per stream.", choices=("shared", "per_stream")
  )
  item_id: str = setting("added", "The learnable item ID (z_ID): added to the fused latent, or none.",
                         choices=("added", "none"))  # fmt: skip
  semantic_id: str = setting("fused", "Codes of the fused stream, or of the modalities in turn.",
                             choices=("fused", "concatenated"))  # fmt: skip
  repair: str = setting("reassign", "Colliding items: to the nearest free ID, or a counting suffix level.",
                        choices=("reassign", "suffix"))  # fmt: skip
  history_layers: int = setting(1, "Layers of the transformer behind the sequence-to-item contrast.", most=100)
  history_heads: int = setting(2, "Attention heads of the transformer behind the contrast.")
  max_length: int = setting(20, "The longest history the contrast looks at, in items.", most=_LARGEST)
  dropout: float = setting(0.1, "Dropout of the transformer behind the contrast.", below=1)
  steps: int = setting(2000, "Training steps.")
  warmup_steps: int = setting(200, "Steps on unquantized latents, before k-means fits the codebooks to them.", least=0)
  kmeans_iterations: int = setting(20, "Iterations of k-means (Lloyd's algorithm) at each level.")
  revival_threshold: float = setting(
    0.1, "A code chosen less than this share of 1 / K is moved to a live residual; 0: never.", below=1
  )
  batch_items: int = setting(256, "Items of the catalogue drawn per batch.")
  batch_rows: int = setting(32, "Rows of packed histories per batch, over all devices.")
  row_length: int = setting(32, "Positions per row of packed histories.")
  device_features: int = setting(
    1024, "Standardised features stay on each device while they take no more MiB than this; others are read per batch.",
    least=0,
  )  # fmt: skip
  hold_out_last: bool = setting(
    True, "Learn from training histories less the last transitions that candidate similarity is fitted on."
  )
  evaluate_every: int = setting(500, "Steps between two health checks (and checkpoints).")
  commitment: float = setting(0.25, "beta of the quantization loss.")
  temperature: float = setting(0.3, "Temperature of the contrast.", above=0)
  level_dropout: float = setting(
    0.5, "Share of items that the contrast sees by a prefix of their codewords alone, so that each prefix tells.",
    most=1,
  )  # fmt: skip
  specific_dropout: float = setting(
    0.5, "Share of items decoded from codes alone in a step, so that codes carry content.", most=1
  )
  own_loss: str = setting("", "A custom loss beside those below, as module:function; see docs/parts.md.")
  weights: LossWeights = section(LossWeights, "Of the losses.")
  club: ClubSettings = section(ClubSettings, "Of the CLUB bound.")
  optimizer: OptimizerSettings = section(
    OptimizerSettings, "Of all parameters.", learning_rate=1e-3, b2=0.98, weight_decay=1e-4, warmup_steps=50
  )

  @property
  def names(self) -> tuple[str, ...]:
    """The modalities."""
    return tuple(name for name, _ in self.modalities)

  @property
  def streams(self) -> tuple[str, ...]:
    """Names of what the codebooks quantize, in order: each modality, "id" if there is one, and "fused"."""
    return (*self.names, *(("id",) if self.item_id != "none" else ()), "fused")

  @property
  def id_streams(self) -> tuple[str, ...]:
    """The streams whose codes make the semantic ID, in order."""
    return self.names if self.semantic_id == "concatenated" else ("fused",)

  @property
  def codebook_shape(self) -> tuple[int, int, int, int]:
    """[G, L, K, d]: G sets of codebooks, one for all streams, or one per stream."""
    sets = len(self.streams) if self.codebooks == "per_stream" else 1
    return sets, self.num_levels, self.num_codes, self.code_width

  def check(self, prefix: str) -> None:
    """Refuses fields that do not fit one another.

    Raises:
      InputError: if some do not.
    """
    field = f"config field {prefix}"
    if not 0 < len(self.hidden) <= 100 or not all(0 < width <= _LARGEST for width in self.hidden):
      raise InputError(f"{field}hidden must be 1 to 100 widths of at least 1, as 512,256, got {self.hidden!r}")
    if self.max_length == 1:
      raise InputError(f"{field}max_length must be at least 2: the contrast needs an item and the next")
    if self.code_width % self.history_heads:
      raise InputError(
        f"{field}code_width = {self.code_width} must be a multiple of {prefix}history_heads = {self.history_heads}"
      )
    if self.row_length < self.max_length:
      raise InputError(
        f"{field}row_length = {self.row_length} must be at least {prefix}max_length = {self.max_length}: a full history"
        " must fit into a row"
      )
    if self.warmup_steps >= self.steps:
      raise InputError(
        f"{field}warmup_steps = {self.warmup_steps} must be less than {prefix}steps = {self.steps}: the codebooks are"
        " fitted when the warm-up ends"
      )


def unchecked_settings(config: Any) -> TokenizerSettings:
  """The tokenizer's settings of a run's config, which is checked elsewhere; without the shapes of the data."""
  return from_config(TokenizerSettings, config.tokenizer, prefix="tokenizer.", unchecked="")
