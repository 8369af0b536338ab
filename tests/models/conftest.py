"""What several tests of models share."""

import flax.linen as nn
import pytest

from bbqrec_jax.models.dropout import Dropout


@pytest.fixture
def doubling_dropout(monkeypatch):
  """Where dropout is at work it doubles every value and drops none: what it is put on can be worked out by hand."""

  def double(self, x, deterministic=None):
    off = nn.merge_param("deterministic", self.deterministic, deterministic)
    return x if off or not self.rate else 2.0 * x

  monkeypatch.setattr(Dropout, "__call__", double)
