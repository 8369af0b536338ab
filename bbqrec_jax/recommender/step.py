"""The training step of stage 2: a pure function of (state, shared data, batch), the same on one device and on many."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from bbqrec_jax.layers.apply import apply
from bbqrec_jax.ops.reduction import mean_weights
from bbqrec_jax.recommender.catalogue import Catalogue
from bbqrec_jax.recommender.model import SequenceModel
from bbqrec_jax.training.partitioning import StepFunction, reduce_shares
from bbqrec_jax.training.state import TrainState, step_key
from bbqrec_jax.training.step import Metrics, updated


@flax.struct.dataclass
class RecommenderState(TrainState):
  """The state of stage 2. Its `params` are what ranks.

  Attributes:
    trained: the parameters that steps change, of which `params` are the moving average; None: these themselves.
  """

  trained: Any = None


def make_recommender_step(
  model: SequenceModel, optimizer: optax.GradientTransformation, *, accumulation: int = 1
) -> StepFunction:
  """The step of stage 2.

  Args:
    model: the recommender, whose settings say how its parameters are averaged.
    optimizer: of its parameters.
    accumulation: parts that a device's rows are worked through in, one after another, so that activations of one part
      alone are there at a time. The gradient is that of the whole batch: each part gives its share of the one mean.

  Returns:
    step(state, catalogue, batch, *, axis_name) -> (state, metrics).
  """

  def step(state: Any, catalogue: Catalogue, batch: Any, *, axis_name: str | None) -> tuple[Any, Metrics]:
    def share(params, batch, weights, key):
      rngs = {"dropout": key}
      return apply(model, params, "loss", catalogue, batch, weights=weights, deterministic=False, rngs=rngs)

    average = state.params
    if state.trained is not None:
      state = state.replace(params=state.trained)

    def shares(*part):
      return jax.value_and_grad(share, has_aux=True)(state.params, *part)

    weights = mean_weights(model.target_mask(batch), axis_name=axis_name)
    key = step_key(state, axis_name)
    if accumulation == 1:
      total = shares(batch, weights, key)
    else:
      parts = (*_in_parts((batch, weights), accumulation), jax.random.split(key, accumulation))
      nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(shares, *jax.tree.map(lambda leaf: leaf[0], parts)))
      total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, shares(*part)), None), nothing, parts)
    (loss, terms), gradients = reduce_shares(total, axis_name)
    state, metrics = updated(state, optimizer, gradients, {"loss": loss, **terms})
    if state.trained is not None:
      average = optax.incremental_update(state.params, average, 1.0 - model.settings.average)
      state = state.replace(params=average, trained=state.params)
    return state, metrics

  return step


def _in_parts(tree: Any, count: int) -> Any:
  """[B, ...] arrays -> [count, B / count, ...]; neighbouring rows go to different parts, so that devices share each."""
  return jax.tree.map(lambda leaf: jnp.moveaxis(leaf.reshape(-1, count, *leaf.shape[1:]), 1, 0), tree)
