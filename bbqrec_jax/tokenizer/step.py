"""The training step of stage 1: a pure function of (state, shared data, batch), the same on one device and on many."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bbqrec_jax.data.pipeline import features_of
from bbqrec_jax.layers.padding import without_padding
from bbqrec_jax.ops.codebooks import code_counts, perplexity, revive_codes
from bbqrec_jax.tokenizer.club import make_disentangling
from bbqrec_jax.tokenizer.losses import TokenizerOutput, tokenizer_loss
from bbqrec_jax.tokenizer.model import Tokenizer, by_codebook
from bbqrec_jax.tokenizer.quantizers import make_quantizer
from bbqrec_jax.tokenizer.settings import TokenizerSettings
from bbqrec_jax.tokenizer.state import TokenizerState
from bbqrec_jax.training.partitioning import StepFunction, reduce_shares
from bbqrec_jax.training.state import step_key
from bbqrec_jax.training.step import Metrics, updated


@dataclasses.dataclass(frozen=True)
class CodebookUpkeep:
  """Revives codes out of use, after each step past the warm-up.

  A code that makes up less than `revival_threshold` of an even use of its level is moved to a residual, drawn at
  random, of the streams that make the semantic IDs.

  Attributes:
    settings: of the tokenizer.
    usage_decay: of the moving average of each code's use.
  """

  settings: TokenizerSettings
  usage_decay: float = 0.98

  def _counted(self, output: TokenizerOutput) -> jax.Array:
    """Which rows of each codebook count, [G, L, R] bool."""
    s = self.settings
    # Codebooks that streams share are judged by the streams that make the IDs; its own codebook, by each stream.
    judged = jnp.array([s.codebooks == "per_stream" or name in s.id_streams for name in s.streams])
    mask = output.present & judged[:, None]
    return by_codebook(s, jnp.broadcast_to(mask[:, None], (len(s.streams), s.num_levels, mask.shape[1])))

  def counts(self, output: TokenizerOutput, *, axis_name: str | None) -> jax.Array:
    """How often a step chose each code, counted over the streams that make semantic IDs: [G, L, K]."""
    chosen = by_codebook(self.settings, jnp.swapaxes(output.codes, 1, 2))
    count = jax.vmap(jax.vmap(lambda code, weight: code_counts(code, self.settings.num_codes, weights=weight)))
    return reduce_shares(count(chosen, self._counted(output)), axis_name)

  def __call__(
    self, codebooks: jax.Array, usage: jax.Array, output: TokenizerOutput, *, key: jax.Array, axis_name: str | None
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Updates the codebooks [G, L, K, d] and the record of their use after a step.

    Args:
      codebooks: after the optimiser.
      usage: [G, L, K], see `TokenizerState`.
      output: of the step's loss.
      key: random key, the same on every device.
      axis_name: the mapped axis over which the batch is split, or None.

    Returns:
      (codebooks, usage, counts [G, L, K] of this step's choices that make semantic IDs).
    """
    counted = self._counted(output)
    counts = self.counts(output, axis_name=axis_name)
    residuals = by_codebook(self.settings, output.residuals)
    rows = jnp.sum(counts, axis=-1, keepdims=True)
    share = jnp.where(rows > 0, counts / jnp.maximum(rows, 1.0), usage)
    usage = self.usage_decay * usage + (1.0 - self.usage_decay) * share
    threshold = self.settings.revival_threshold
    if threshold:
      if axis_name is not None:
        # Every device must move the same codes to the same places.
        residuals, counted = (jax.lax.all_gather(x, axis_name, axis=2, tiled=True) for x in (residuals, counted))
      keys = jax.random.split(key, counts.shape[:2])
      revive = jax.vmap(jax.vmap(functools.partial(revive_codes, threshold=threshold)))
      codebooks, usage = revive(keys, codebooks, usage, residuals, counted)
    return codebooks, usage, counts


def temperature_at(settings: TokenizerSettings, step: jax.Array) -> jax.Array:
  """Temperature of the contrast at a step: constant (docs/parts.md shows a schedule)."""
  del step
  return jnp.float32(settings.temperature)


def make_tokenizer_step(model: Tokenizer, optimizer: optax.GradientTransformation) -> StepFunction:
  """The step of stage 1, as the model's settings describe it.

  Until the warm-up is over it trains on unquantized latents; codebooks are fitted to these when it ends, and kept up
  from then on. The network of the CLUB bound is fitted to the latents of each batch after the main step, so that the
  next one judges it on rows it has not been fitted to.

  Args:
    model: the tokenizer.
    optimizer: of all its parameters.

  Returns:
    step(state, shared, batch, *, axis_name) -> (state, metrics); `shared` is a `FeatureStore.table` where batches are
    made without features, otherwise None.
  """
  settings = model.settings
  fixed = make_quantizer(settings).fixed() is not None
  disentangling, upkeep = make_disentangling(settings), CodebookUpkeep(settings)

  def step(state: TokenizerState, shared: Any, batch: Any, *, axis_name: str | None) -> tuple[TokenizerState, Metrics]:
    if shared is not None:
      table = without_padding(shared)
      batch = batch | features_of(batch, lambda items: jax.tree.map(lambda array: array[items], table))
    quantized, temperature = state.step >= settings.warmup_steps, temperature_at(settings, state.step)
    key = step_key(state, axis_name)
    bound = None
    if disentangling is not None:
      bound = disentangling.bound(state.club, axis_name=axis_name)

    def loss_function(params):
      return tokenizer_loss(
        model, params, batch, quantized=quantized, temperature=temperature, bound=bound, key=key, axis_name=axis_name
      )

    (loss, output), gradients = jax.value_and_grad(loss_function, has_aux=True)(state.params)
    loss, terms, gradients = reduce_shares((loss, output.terms, gradients), axis_name)
    metrics = {"loss": loss, **terms}
    # A number that no device has, so that no device's dropout draws from this key.
    upkeep_key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 2**32 - 1)
    state, metrics = updated(state, optimizer, gradients, metrics)
    if disentangling is not None:
      club, club_opt_state, likelihood = disentangling.update(
        state.club,
        state.club_opt_state,
        output.quantized,
        output.specific,
        batch["present"],
        axis_name=axis_name,
      )
      state = state.replace(club=club, club_opt_state=club_opt_state)  # type: ignore[attr-defined]
      metrics["club_likelihood"] = likelihood

    if fixed:
      metrics["perplexity_level_1"] = perplexity(upkeep.counts(output, axis_name=axis_name)[-1, 0])
      return state, metrics
    before = state.params["codebooks"]
    codebooks, usage, counts = upkeep(before, state.usage, output, key=upkeep_key, axis_name=axis_name)
    metrics["perplexity_level_1"] = perplexity(counts[-1, 0])
    codebooks, usage = (jnp.where(quantized, new, old) for new, old in ((codebooks, before), (usage, state.usage)))
    return state.replace(params=state.params | {"codebooks": codebooks}, usage=usage), metrics  # type: ignore[attr-defined]

  return step
