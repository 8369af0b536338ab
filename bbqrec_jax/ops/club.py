"""CLUB: an upper bound on the mutual information of two latents (Cheng et al., ICML 2020).

    q(y | x) = N(y; mean(x), diag exp(log_variance(x)))
    bound    = E_{p(x, y)}[log q(y | x)] - E_{p(x)} E_{p(y)}[log q(y | x)]

It is a bound only while q fits the data, so q takes likelihood steps of its own between the steps that lower the bound.
It may be negative while q is poor, and is never clipped: a clipped bound has no gradient where it is needed.
"""

import jax
import jax.numpy as jnp

from bbqrec_jax.ops.reduction import masked_mean


def gaussian_log_likelihood(mean: jax.Array, log_variance: jax.Array, y: jax.Array) -> jax.Array:
  """Log N(y; mean, diag exp(log_variance)), less the constant -d/2 log(2 pi): each [B, d] -> [B] float32, in nats."""
  mean, log_variance, y = (x.astype(jnp.float32) for x in (mean, log_variance, y))
  return -0.5 * jnp.sum(jnp.square(y - mean) * jnp.exp(-log_variance) + log_variance, axis=-1)


def club_full(
  mean: jax.Array, log_variance: jax.Array, y: jax.Array, valid: jax.Array, *, axis_name: str | None = None
) -> jax.Array:
  """The bound with every valid row of the global batch as a negative, at the cost of one.

  The mean of |y_j - mean_i|^2 over j needs only the mean and variance of y, so nothing of size B x B is formed.

  Args:
    mean: [B, d], q's mean for each x.
    log_variance: [B, d].
    y: [B, d]; row i was observed together with x of row i.
    valid: [B] bool.
    axis_name: the mapped axis over which the batch is split, or None.

  Returns:
    This device's share of the mean over valid rows (see `masked_mean`), in nats.
  """
  mean, log_variance, y = (x.astype(jnp.float32) for x in (mean, log_variance, y))

  def moment(values):
    share = jnp.sum(jnp.where(valid[:, None], values, 0.0), axis=0)
    count = jnp.sum(valid.astype(jnp.float32))
    if axis_name is not None:
      # Each device's loss must feel every row: gathered, not summed, so that gradients find their way back once.
      share = jnp.sum(jax.lax.all_gather(share, axis_name), axis=0)
      count = jnp.sum(jax.lax.all_gather(count, axis_name), axis=0)
    return share / jnp.maximum(count, 1.0)

  centre = moment(y)
  spread = moment(jnp.square(y - centre[None]))
  negative = -0.5 * jnp.sum(
    (jnp.square(centre[None] - mean) + spread[None]) * jnp.exp(-log_variance) + log_variance, axis=-1
  )
  positive = gaussian_log_likelihood(mean, log_variance, y)
  return masked_mean(positive - negative, valid, axis_name=axis_name)
