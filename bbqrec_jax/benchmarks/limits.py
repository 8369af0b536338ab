"""Limits of a machine: the peak of its data sheet, and the measured rates of a product and a copy."""

import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Peak(NamedTuple):
  """A device's peak by its maker's data sheet, dense.

  Attributes:
    bfloat16: floating-point operations per second.
    float32: likewise, as JAX multiplies by default: in TF32 where the device has it; None where its matrix units have
      none.
    bytes: of memory per second.
  """

  bfloat16: float
  float32: float | None
  bytes: float


# By `jax.Device.device_kind`.
PEAKS = {
  "TPU v4": Peak(275e12, None, 1.2e12),
  "TPU v5 lite": Peak(197e12, None, 0.82e12),
  "TPU v5": Peak(459e12, None, 2.77e12),
  "TPU v6 lite": Peak(918e12, None, 1.64e12),
  "Tesla T4": Peak(65e12, 8.1e12, 0.32e12),
  "NVIDIA L4": Peak(121e12, 60e12, 0.3e12),
  "NVIDIA A100-SXM4-40GB": Peak(312e12, 156e12, 1.56e12),
  "NVIDIA A100-SXM4-80GB": Peak(312e12, 156e12, 2.04e12),
  "NVIDIA H100 80GB HBM3": Peak(989e12, 494e12, 3.35e12),
  "NVIDIA H200": Peak(989e12, 494e12, 4.8e12),
}


def measured_limits(*, size: int | None = None, repeats: int = 10) -> dict[str, float]:
  """The rate of a large matrix product and of a copy on one device, by the median of some runs.

  Args:
    size: of the square matrices; None: 2,048 on a CPU, 8,192 on an accelerator, which less would not keep busy.
    repeats: runs that are timed.

  Returns:
    `matmul_float32` (as JAX multiplies by default, so in TF32 on GPUs that have it) and `matmul_bfloat16` in operations
    per second, `copy` in bytes read and written per second.
  """
  on_cpu = jax.default_backend() == "cpu"
  size = size or (2048 if on_cpu else 8192)
  limits = {}
  for name in ("float32", "bfloat16"):
    # Not of one number, which some devices multiply faster.
    matrix = jax.random.normal(jax.random.key(0), (size, size), name)
    product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=a.dtype))
    limits[f"matmul_{name}"] = 2.0 * size**3 / _median_seconds(product, matrix, repeats=repeats)
  block = jnp.ones(2**26 if on_cpu else 2**28, jnp.float32)  # 256 MiB or 1 GiB: larger than any cache.
  limits["copy"] = 2.0 * block.nbytes / _median_seconds(jax.jit(lambda a: a + 1.0), block, repeats=repeats)
  return limits


def _median_seconds(function: Any, argument: jax.Array, *, repeats: int, queued: int = 4) -> float:
  """Of one call, where some are queued one behind the other, so that the way to the device and back is not counted."""
  jax.block_until_ready(function(argument))
  taken = []
  for _ in range(repeats):
    start = time.perf_counter()
    for _ in range(queued):
      result = function(argument)
    jax.block_until_ready(result)
    taken.append((time.perf_counter() - start) / queued)
  return statistics.median(taken)
