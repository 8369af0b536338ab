"""Stage 1, the behaviour-bind tokenizer: from item features and histories to one shared residual codebook."""

import dataclasses
import functools
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
    item_id: the learnable ID vector (the paper's z_ID): "added" to the fused latent, a "stream" of its own alone, or
      "none".
    semantic_id: what an item's ID is made of: the codes of the "fused" stream, of the modalities "concatenated" (as in
      MQL4GRec), or of the "item_id" stream.
    codebooks: "shared" by all streams (the paper's), one "per_stream" (what it argues against), or a "single" one for
      all streams and levels.
    quantizer: a name of `ops.quantize.QUANTIZERS`.
    gradient: a name of `ops.quantize.GRADIENTS`, how gradients pass through the codewords.
    balanced_last: whether the last level's codes are balanced over the batch while training.
    moving_average: whether codewords follow moving averages instead of a loss.
    learn_temperature: whether the contrast's temperature is a parameter.
    temperature: of the contrast, or where it starts.
    specific_dropout: share of items whose decoders get no specific latent in a step, so that the codes must carry what
      the item is (this project's choice: nothing else asks the codewords for content).
    level_dropout: share of items that the contrast sees by their first codewords alone, one to L - 1 of them, so that
      every prefix of an ID learns what follows what (this project's choice, after SoundStream's quantizer dropout).
    commitment: beta of the quantization loss.
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
  item_id: str = "added"
  semantic_id: str = "fused"
  codebooks: str = "shared"
  quantizer: str = "rq_vae"
  gradient: str = "straight_through"
  balanced_last: bool = False
  moving_average: bool = False
  learn_temperature: bool = False
  temperature: float = 0.1
  specific_dropout: float = 0.5
  level_dropout: float = 0.5
  commitment: float = 0.25
  normalize: bool = True
  history_layers: int = 1
  history_heads: int = 2
  max_length: int = 20
  dropout: float = 0.1

  @property
  def streams(self) -> tuple[str, ...]:
    """Names of what the codebooks quantize, in order: each modality, "id" if there is one, and "fused"."""
    return (*self.names, *(("id",) if self.item_id != "none" else ()), "fused")

  @property
  def names(self) -> tuple[str, ...]:
    """The modalities."""
    return tuple(name for name, _ in self.modalities)

  @property
  def id_streams(self) -> tuple[str, ...]:
    """The streams whose codes make the semantic ID, in order."""
    return {"fused": ("fused",), "concatenated": self.names, "item_id": ("id",)}[self.semantic_id]

  @property
  def codebook_shape(self) -> tuple[int, int, int, int]:
    """[G, L', K, d]: G sets of codebooks (one, or one a stream) of L' levels (all L, or one that serves for all)."""
    sets = len(self.streams) if self.codebooks == "per_stream" else 1
    return sets, 1 if self.codebooks == "single" else self.num_levels, self.num_codes, self.code_width


def by_codebook(settings: TokenizerSettings, rows: jax.Array) -> jax.Array:
  """Sorts rows by the codebook that serves them: [S, L, B, ...] -> [G, L', R, ...] (see `codebook_shape`)."""
  rest = rows.shape[3:]
  if settings.codebooks == "per_stream":
    return rows
  if settings.codebooks == "single":
    return rows.reshape(1, 1, -1, *rest)
  return jnp.swapaxes(rows, 0, 1).reshape(1, rows.shape[1], -1, *rest)


def stream_codebooks(settings: TokenizerSettings, codebooks: jax.Array) -> jax.Array:
  """The codebooks of every stream and level: [G, L', K, d] -> [S, L, K, d]."""
  shape = (len(settings.streams), settings.num_levels, *codebooks.shape[2:])
  return jnp.broadcast_to(codebooks, shape)


class Latents(NamedTuple):
  """What is quantized, one row a stream (see `TokenizerSettings.streams`).

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
    if s.item_id != "none":
      self.item_embedding = nn.Embed(s.num_items, s.code_width, embedding_init=nn.initializers.normal(0.02))
    self.codebooks = self.param("codebooks", nn.initializers.normal(s.code_width**-0.5), s.codebook_shape)
    if s.learn_temperature:
      self.log_temperature = self.param("log_temperature", nn.initializers.constant(jnp.log(s.temperature)), ())
    self.history = CausalBackbone(
      s.history_layers, s.history_heads, 4 * s.code_width, s.max_length, s.dropout, name="history"
    )
    # The identity at first: a history points at items like its own, and items that follow one another come together.
    self.query = nn.Dense(s.code_width, kernel_init=_identity, name="query")

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
    scale = self.latent_norm if self.settings.normalize else lambda x: x
    values = [scale(self.behaviour_encoders[name](features[name])) for name in names]
    masks = [present[name] for name in names]
    weights = jnp.stack(masks).astype(jnp.float32)[..., None]
    fused = jnp.sum(jnp.stack(values) * weights, axis=0) / jnp.maximum(jnp.sum(weights, axis=0), 1.0)
    everywhere = jnp.ones(masks[0].shape, bool)
    if item_id is not None:
      # Never scaled up: an ID starts as small noise, and would take the codebook from what the features say.
      if self.settings.item_id == "added":
        fused = fused + item_id
      values.append(item_id)
      masks.append(everywhere)
    stacked, here = jnp.stack([*values, scale(fused)]), jnp.stack([*masks, everywhere])
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

  def quantize(
    self,
    values: jax.Array,
    present: jax.Array | None = None,
    *,
    balance: bool = False,
    axis_name: str | None = None,
  ) -> quantize.ResidualQuantization:
    """Quantizes stacked streams, each with its codebooks.

    Args:
      values: [S, B, d].
      present: [S, B] bool, the rows that count where codes are balanced; None: all.
      balance: whether the last level's codes are balanced over the rows of a codebook.
      axis_name: the mapped axis over which the rows are split, or None.

    Returns:
      A `ResidualQuantization` whose arrays have a leading S: [S, B, L], [S, B, d] and twice [S, L, B, d].
    """
    s = self.settings
    streams, batch, width = values.shape
    sets = self.codebooks.shape[0]
    codebooks = jnp.broadcast_to(self.codebooks, (sets, s.num_levels, s.num_codes, width))
    valid = jnp.ones((streams, batch), bool) if present is None else present

    def one(rows, codebooks, valid):
      if not balance:
        return quantize.QUANTIZERS[s.quantizer](rows, codebooks)
      choose = functools.partial(quantize.balanced_code, valid=valid, axis_name=axis_name)
      return quantize.residual_quantize(rows, codebooks, choose_last=choose)

    result = jax.vmap(one)(values.reshape(sets, -1, width), codebooks, valid.reshape(sets, -1))

    def by_stream(array):
      """[G, L, R, d] -> [S, L, B, d]."""
      array = array.reshape(sets, s.num_levels, streams // sets, batch, width)
      return jnp.swapaxes(array, 1, 2).reshape(streams, s.num_levels, batch, width)

    return quantize.ResidualQuantization(
      result.codes.reshape(streams, batch, s.num_levels),
      result.quantized.reshape(streams, batch, width),
      by_stream(result.residuals),
      by_stream(result.codewords),
    )

  def temperature(self) -> jax.Array:
    """Of the contrast; a learned one stays at 0.01 or more, for the scores' sake (as in CLIP)."""
    if not self.settings.learn_temperature:
      return jnp.asarray(self.settings.temperature)
    return jnp.maximum(jnp.exp(self.log_temperature), 0.01)

  def __call__(self, batch: dict[str, Any]) -> jax.Array:
    """Touches every parameter, for `init`; training calls `tokenizer_loss`."""
    latents = self.latents(batch["items"], batch["features"], batch["present"])
    fused = self.quantize(latents.values).quantized[-1]
    self.temperature()
    self.reconstruct(dict.fromkeys(self.settings.names, fused), self.specific(batch["features"]))
    return self.history_states(
      fused[None], jnp.ones((1, len(batch["items"])), jnp.int32),
      jnp.arange(len(batch["items"]))[None], deterministic=True,
    )  # fmt: skip


class LossWeights(NamedTuple):
  """Weight of each loss of stage 1; the sum of the weighted terms is minimised."""

  reconstruction: float | jax.Array = 1.0
  fused_reconstruction: float | jax.Array = 1.0
  quantization: float | jax.Array = 1.0
  contrast: float | jax.Array = 2.0
  modality_contrast: float | jax.Array = 1.0
  item_id: float | jax.Array = 0.05
  disentangle: float | jax.Array = 0.01


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
    key: for dropout of activations and of specific latents; None means neither, and no balanced codes.
    axis_name: the mapped axis over which the batch is split, or None.

  Returns:
    (loss, `TokenizerOutput`); over several devices the loss is this device's share.
  """
  s = model.settings
  names, streams, training = s.names, s.streams, key is not None

  def run(method, *args, **kwargs):
    rngs = {"dropout": key} if training else None
    return apply(model, params, method, *args, rngs=rngs, **kwargs)

  def through_codebook(latents, *, balance=False, levels=None):
    """The quantization of stacked streams, and straight-through codewords, or latents while there is no codebook.

    `levels` [B] says how many of each item's codewords, from the first, are passed on; None is all.
    """
    result = run("quantize", latents.values, latents.present, balance=balance, axis_name=axis_name)
    codewords = result.quantized
    if levels is not None:
      kept = jnp.arange(s.num_levels)[:, None] < levels
      codewords = jnp.sum(jnp.where(kept[..., None], result.codewords, 0.0), axis=1)
    passed = quantize.GRADIENTS[s.gradient](latents.values, codewords)
    return result, jnp.where(quantized, passed, latents.values)

  def mean_error(rebuilt):
    """Mean squared error over width, present rows and modalities."""
    total = jnp.asarray(0.0)
    for name in names:
      error = jnp.mean(jnp.square(rebuilt[name] - batch["features"][name]), axis=-1)
      total += masked_mean(error, batch["present"][name], axis_name=axis_name) / len(names)
    return total

  latents = run("latents", batch["items"], batch["features"], batch["present"])
  result, passed = through_codebook(latents, balance=s.balanced_last and training)
  specific = run("specific", batch["features"])
  behaviour = {name: passed[streams.index(name)] for name in names}
  given = specific
  if key is not None and s.specific_dropout:
    kept = jax.random.bernoulli(jax.random.fold_in(key, 3), 1.0 - s.specific_dropout, (len(batch["items"]), 1))
    given = {name: jnp.where(kept, value, 0.0) for name, value in specific.items()}
  reconstruction = mean_error(run("reconstruct", behaviour, given))
  nothing = jax.tree.map(jnp.zeros_like, specific)
  fused_reconstruction = mean_error(run("reconstruct", dict.fromkeys(names, passed[-1]), nothing))

  error = jax.vmap(
    lambda one: quantize.quantization_error(one, commitment=s.commitment, learn_codebooks=not s.moving_average)
  )(result)
  quantization = masked_mean(error.reshape(-1), latents.present.reshape(-1), axis_name=axis_name)
  quantization = jnp.where(quantized, quantization, 0.0)

  item_id = jnp.asarray(0.0)
  if "id" in streams:
    everyone = jnp.ones(len(batch["items"]), bool)
    squared = jnp.sum(jnp.square(latents.values[streams.index("id")]), axis=-1)
    item_id = masked_mean(squared, everyone, axis_name=axis_name)

  disentangle = jnp.asarray(0.0) if bound is None else bound(behaviour, specific, batch["present"])

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
  loss = sum((getattr(weights, name) * value for name, value in terms.items()), start=jnp.asarray(0.0))
  observed = jax.lax.stop_gradient((result.codes, result.residuals, latents.present, behaviour, specific))
  return loss, TokenizerOutput(terms | {"contrast_accuracy": accuracy}, *observed)


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
    prefix = jax.random.randint(number, items.shape, 1, settings.num_levels)
    levels = jnp.where(jax.random.bernoulli(dropped, settings.level_dropout, items.shape), prefix, settings.num_levels)
  _, passed = through_codebook(latents, levels=levels)
  temperature = run("temperature")
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
