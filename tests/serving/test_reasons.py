"""Why an item is recommended: what speaks for it, and never what speaks against it."""

import numpy as np
import pytest

from bbqrec_jax.serving.reasons import Cosines


def test_an_item_that_is_unlike_is_no_reason():
  vectors = np.array([[1.0, 0.0], [0.6, 0.8], [-0.6, 0.8], [0.0, 0.0]])
  cosines = Cosines({"text": vectors}, max_length=5)
  ((reasons, none),) = cosines([np.array([1, 2, 3])], [np.array([0, 3])], count=3)
  assert [(one.item, one.stream) for one in reasons] == [(1, "text")]
  assert reasons[0].similarity == pytest.approx(0.6)
  assert none == [], "an item without a vector is like nothing"
