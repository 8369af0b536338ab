"""AdamW with its learning-rate schedule, weight-decay mask and gradient clipping."""

from typing import Any

import jax
import optax


def make_schedule(settings: Any, *, total_steps: int) -> optax.Schedule:
  """Linear warm-up, then cosine decay to a hundredth.

  Args:
    settings: has `learning_rate` and `warmup_steps`.
    total_steps: steps of the whole run.
  """
  warmup = min(settings.warmup_steps, total_steps)
  rise = optax.linear_schedule(0.0, settings.learning_rate, max(warmup, 1))
  fall = optax.cosine_decay_schedule(settings.learning_rate, max(total_steps - warmup, 1), alpha=0.01)
  return optax.join_schedules([rise, fall], [warmup])


def make_optimizer(settings: Any, *, total_steps: int) -> optax.GradientTransformation:
  """AdamW behind a global-norm clip; only the layers' matrices decay.

  That is, not biases, norms, tables of embeddings or of codes, nor what makes an item's vector of its features.

  Args:
    settings: as for `make_schedule`, and `b2`, `weight_decay`, `clip_norm`.
    total_steps: steps of the whole run.
  """

  def decays(params):
    # Any place of the path: the rows of a matrix may be in a structure of their own (`PaddedRows`).
    return jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.DictKey("kernel") in path, params)

  return optax.chain(
    optax.clip_by_global_norm(settings.clip_norm),
    optax.adamw(
      make_schedule(settings, total_steps=total_steps), b2=settings.b2, weight_decay=settings.weight_decay, mask=decays
    ),
  )
