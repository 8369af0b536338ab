"""The training steps: pure functions of (state, shared data, batch), the same on one device and on many."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bbqrec_jax.data.pipeline import features_of
from bbqrec_jax.models.apply import apply
from bbqrec_jax.models.critic import ClubCritic
from bbqrec_jax.models.padding import without_padding
from bbqrec_jax.models.recommender import Catalogue, Recommender
from bbqrec_jax.models.tokenizer import Tokenizer, TokenizerSettings, by_codebook
from bbqrec_jax.models.tokenizer_loss import Bound, LossWeights, OwnLoss, TokenizerOutput, tokenizer_loss
from bbqrec_jax.ops.club import club_full, club_sampled, gaussian_log_likelihood
from bbqrec_jax.ops.codebooks import code_counts, moving_average, perplexity, revive_codes
from bbqrec_jax.ops.reduction import masked_mean, mean_weights
from bbqrec_jax.parallel import StepFunction, reduce_shares
from bbqrec_jax.train.state import CodebookUse, TrainState, step_key

Metrics = dict[str, jax.Array]


def updated(
  state: TrainState, optimizer: optax.GradientTransformation, gradients: Any, metrics: Metrics
) -> tuple[TrainState, Metrics]:
  """The state after a step of an optimiser, and the metrics with the norm of the gradients."""
  updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = metrics | {"gradient_norm": optax.tree.norm(gradients)}
  return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics  # type: ignore[attr-defined]


def skip_nonfinite(step: StepFunction) -> StepFunction:
  """The step, but for one thing: where its metrics are not all finite, nothing changes but the count of steps.

  The loss and the norm of the gradients are among the metrics, and metrics are the same on every device.
  """

  def guarded(state: TrainState, shared: Any, batch: Any, *, axis_name: str | None) -> tuple[TrainState, Metrics]:
    following, metrics = step(state, shared, batch, axis_name=axis_name)
    finite = jnp.all(jnp.stack([jnp.isfinite(value) for value in metrics.values()]))
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), following, state)
    return kept.replace(step=following.step), metrics

  return guarded


@dataclasses.dataclass(frozen=True)
class Disentangling:
  """How the CLUB bound is fitted and taken.

  Attributes:
    critic: the network q(s_m | q_m).
    optimizer: its own.
    steps: likelihood steps it takes on each batch, before the next one's main step.
    full: every row of the global batch is a negative; otherwise one drawn row is.
  """

  critic: ClubCritic
  optimizer: optax.GradientTransformation
  steps: int = 5
  full: bool = True

  def bound(self, params: Any, *, key: jax.Array, axis_name: str | None) -> Bound:
    """The bound with the network held fixed."""

    def total(quantized, specific, present):
      predicted = apply(self.critic, jax.lax.stop_gradient(params), "__call__", quantized)
      value = jnp.zeros((), jnp.float32)
      for index, (name, (mean, log_variance)) in enumerate(sorted(predicted.items())):
        rows = (mean, log_variance, specific[name], present[name])
        if self.full:
          value += club_full(*rows, axis_name=axis_name)
        else:
          value += club_sampled(*rows, key=jax.random.fold_in(key, index), axis_name=axis_name)
      return value

    return total

  def update(
    self,
    params: Any,
    opt_state: optax.OptState,
    quantized: dict[str, jax.Array],
    specific: dict[str, jax.Array],
    present: dict[str, jax.Array],
    *,
    axis_name: str | None,
  ) -> tuple[Any, optax.OptState, jax.Array]:
    """Likelihood steps on latents that carry no gradient: (params, opt_state, log-likelihood before the last step)."""

    def surprise(params):
      predicted = apply(self.critic, params, "__call__", quantized)
      value = jnp.zeros((), jnp.float32)
      for name, (mean, log_variance) in predicted.items():
        likelihood = gaussian_log_likelihood(mean, log_variance, specific[name])
        value -= masked_mean(likelihood, present[name], axis_name=axis_name)
      return value

    def one(carry, _):
      params, opt_state = carry
      value, gradients = reduce_shares(jax.value_and_grad(surprise)(params), axis_name)
      updates, opt_state = self.optimizer.update(gradients, opt_state, params)
      return (optax.apply_updates(params, updates), opt_state), -value

    (params, opt_state), likelihoods = jax.lax.scan(one, (params, opt_state), None, length=self.steps)
    return params, opt_state, likelihoods[-1]


@dataclasses.dataclass(frozen=True)
class CodebookUpkeep:
  """What happens to the codewords beside the loss: moving averages, and revival of codes out of use.

  Attributes:
    settings: of the tokenizer.
    revival_threshold: a code that makes up less than this share of an even use of its level is moved to a live residual
      of the streams that make the semantic IDs; 0 never moves one.
    usage_decay: of the average that share is taken of.
    codeword_decay: of the averages that codewords follow, where they do.
  """

  settings: TokenizerSettings
  revival_threshold: float = 0.1
  usage_decay: float = 0.98
  codeword_decay: float = 0.98

  def __call__(
    self, codebooks: jax.Array, use: CodebookUse, output: TokenizerOutput, *, key: jax.Array, axis_name: str | None
  ) -> tuple[jax.Array, CodebookUse, jax.Array]:
    """Keeps codebooks [G, L', K, d] up after a step.

    Args:
      codebooks: after the optimiser.
      use: what was known of their use.
      output: of the step's loss.
      key: random key, the same on every device.
      axis_name: the mapped axis over which the batch is split, or None.

    Returns:
      (codebooks, use, counts [G, L', K] of this step's choices that make semantic IDs).
    """
    s = self.settings
    num_codes = codebooks.shape[-2]

    def spread(mask):
      """[S, B] -> one flag a row of each codebook, [G, L', R]."""
      return by_codebook(s, jnp.broadcast_to(mask[:, None], (len(s.streams), s.num_levels, mask.shape[1])))

    # Codebooks that streams share are judged by the streams that make the IDs; its own codebook, by each stream.
    judged = jnp.array([s.codebooks == "per_stream" or name in s.id_streams for name in s.streams])
    chosen = by_codebook(s, jnp.swapaxes(output.codes, 1, 2))
    residuals = by_codebook(s, output.residuals)
    present, counted = spread(output.present), spread(output.present & judged[:, None])

    if s.moving_average:
      average = functools.partial(moving_average, decay=self.codeword_decay, axis_name=axis_name)
      averaged = jax.vmap(jax.vmap(average))
      codebooks, mass, total = averaged(codebooks, use.mass, use.total, chosen, residuals, present)
      use = use.replace(mass=mass, total=total)  # type: ignore[attr-defined]

    counts = jax.vmap(jax.vmap(lambda code, weight: code_counts(code, num_codes, weights=weight)))(chosen, counted)
    counts = reduce_shares(counts, axis_name)
    rows = jnp.sum(counts, axis=-1, keepdims=True)
    share = jnp.where(rows > 0, counts / jnp.maximum(rows, 1.0), use.usage)
    usage = self.usage_decay * use.usage + (1.0 - self.usage_decay) * share
    if self.revival_threshold:
      if axis_name is not None:
        # Every device must move the same codes to the same places.
        residuals, counted = (jax.lax.all_gather(x, axis_name, axis=2, tiled=True) for x in (residuals, counted))
      keys = jax.random.split(key, counts.shape[:2])
      revive = jax.vmap(jax.vmap(functools.partial(revive_codes, threshold=self.revival_threshold)))
      codebooks, revived = revive(keys, codebooks, usage, residuals, counted)
      if s.moving_average:
        moved = revived != usage
        mass = jnp.where(moved, 1.0, use.mass)
        total = jnp.where(moved[..., None], codebooks, use.total)
        use = use.replace(mass=mass, total=total)  # type: ignore[attr-defined]
      usage = revived
    return codebooks, use.replace(usage=usage), counts  # type: ignore[attr-defined]


def make_tokenizer_step(
  model: Tokenizer,
  optimizer: optax.GradientTransformation,
  *,
  weights: LossWeights,
  warmup_steps: int,
  upkeep: CodebookUpkeep,
  disentangling: Disentangling | None = None,
  own_loss: OwnLoss | None = None,
) -> StepFunction:
  """The step of stage 1.

  Args:
    model: the tokenizer.
    optimizer: of all its parameters.
    weights: of the losses.
    warmup_steps: steps on unquantized latents; the codebooks are fitted to the latents when they end.
    upkeep: of the codewords, from then on.
    disentangling: the CLUB bound; None leaves it out. Its network is fitted to the latents of each batch after the main
      step, so that the next one judges it on rows it has not been fitted to.
    own_loss: see `tokenizer_loss`.

  Returns:
    step(state, shared, batch, *, axis_name) -> (state, metrics); `shared` is a `FeatureStore.table` where batches are
    made without features, otherwise None.
  """

  def step(state: TrainState, shared: Any, batch: Any, *, axis_name: str | None) -> tuple[TrainState, Metrics]:
    if shared is not None:
      table = without_padding(shared)
      batch = batch | features_of(batch, lambda items: jax.tree.map(lambda array: array[items], table))
    quantized = state.step >= warmup_steps
    key = step_key(state, axis_name)
    bound = None
    if disentangling is not None:
      bound = disentangling.bound(state.critic, key=jax.random.fold_in(key, 2), axis_name=axis_name)

    def loss_function(params):
      return tokenizer_loss(
        model, params, batch, weights=weights, quantized=quantized, bound=bound, own_loss=own_loss, key=key,
        axis_name=axis_name,
      )  # fmt: skip

    (loss, output), gradients = jax.value_and_grad(loss_function, has_aux=True)(state.params)
    loss, terms, gradients = reduce_shares((loss, output.terms, gradients), axis_name)
    metrics = {"loss": loss, **terms}
    # A number that no device has, so that no device's dropout draws from this key.
    upkeep_key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 2**32 - 1)
    state, metrics = updated(state, optimizer, gradients, metrics)
    if disentangling is not None:
      critic, critic_opt_state, likelihood = disentangling.update(
        state.critic,
        state.critic_opt_state,
        output.quantized,
        output.specific,
        batch["present"],
        axis_name=axis_name,
      )
      state = state.replace(critic=critic, critic_opt_state=critic_opt_state)  # type: ignore[attr-defined]
      metrics["critic_likelihood"] = likelihood

    assert state.codes is not None
    before = state.params["codebooks"]
    codebooks, use, counts = upkeep(before, state.codes, output, key=upkeep_key, axis_name=axis_name)
    metrics["perplexity_level_1"] = perplexity(counts[-1, 0])
    codebooks, use = jax.tree.map(
      lambda new, old: jnp.where(quantized, new, old), (codebooks, use), (before, state.codes)
    )
    return state.replace(params=state.params | {"codebooks": codebooks}, codes=use), metrics  # type: ignore[attr-defined]

  return step


def make_recommender_step(
  model: Recommender, optimizer: optax.GradientTransformation, *, accumulation: int = 1
) -> StepFunction:
  """The step of stage 2.

  Args:
    model: the recommender.
    optimizer: of its parameters.
    accumulation: parts that a device's rows are worked through in, one after another, so that activations of one part
      alone are there at a time. The gradient is that of the whole batch: each part gives its share of the one mean.

  Returns:
    step(state, catalogue, batch, *, axis_name) -> (state, metrics).
  """

  def step(state: TrainState, catalogue: Catalogue, batch: Any, *, axis_name: str | None) -> tuple[TrainState, Metrics]:
    def share(params, batch, weights, key):
      rngs = {"dropout": key}
      return apply(model, params, "loss", catalogue, batch, weights=weights, deterministic=False, rngs=rngs)

    def shares(*part):
      return jax.value_and_grad(share, has_aux=True)(state.params, *part)

    weights = mean_weights(model.counted(batch), axis_name=axis_name)
    key = step_key(state, axis_name)
    if accumulation == 1:
      total = shares(batch, weights, key)
    else:
      parts = (*_in_parts((batch, weights), accumulation), jax.random.split(key, accumulation))
      nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(shares, *jax.tree.map(lambda leaf: leaf[0], parts)))
      total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, shares(*part)), None), nothing, parts)
    (loss, terms), gradients = reduce_shares(total, axis_name)
    return updated(state, optimizer, gradients, {"loss": loss, **terms})

  return step


def _in_parts(tree: Any, count: int) -> Any:
  """[B, ...] arrays -> [count, B / count, ...]; neighbouring rows go to different parts, so that devices share each."""
  return jax.tree.map(lambda leaf: jnp.moveaxis(leaf.reshape(-1, count, *leaf.shape[1:]), 1, 0), tree)
