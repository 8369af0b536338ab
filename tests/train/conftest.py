"""What several tests of the stages share."""

import numpy as np
import pytest

from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.semantic_ids.artefact import SemanticIds


@pytest.fixture(scope="session")
def others():
  """A function from a field's value to two that it may be set to, of which one at least is nobody's default."""

  def two(value):
    if isinstance(value, bool):
      return True, False
    if isinstance(value, str):
      return f"{value} of another kind", "another"
    if isinstance(value, tuple):
      return (*value, 3), (5,)
    return (value + 1, value + 2) if isinstance(value, int) else (value + 0.125, value + 0.25)

  return two


@pytest.fixture(scope="session")
def ids():
  """Random semantic IDs of 30 items with text, 70 % of them with an image: 3 levels of 4 codes."""
  num_items, levels, num_codes = 30, 3, 4
  rng = np.random.default_rng(0)
  own = np.stack(
    np.unravel_index(rng.choice(num_codes**levels, num_items, replace=False), (num_codes,) * levels), axis=1
  )
  present = np.ones((3, num_items), bool)
  present[1] = rng.random(num_items) < 0.7
  return SemanticIds(
    streams=("text", "image", "fused"),
    codes=own.astype(np.int32),
    stream_codes=rng.integers(num_codes, size=(3, num_items, levels)).astype(np.int32),
    present=present,
    codebooks=rng.normal(size=(1, levels, num_codes, 5)).astype(np.float32),
    data_hash="of a test",
    item_ids=ItemIds.numbered(num_items),
  )
