"""What several tests of the stages share."""

import pytest


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
