"""That freed memory stays with the process, and that what the environment says of it comes first."""

import os
import subprocess
import sys

import pytest

# How many pages the kernel hands out while one array after the other is made and dropped.
PROGRAM = """
import resource, sys
import numpy as np
from bbqrec_jax.utils.host_memory import keep_memory
print(keep_memory() if sys.argv[1] == "keep" else None)
np.ones(2**24, np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
  np.ones(2**24, np.float32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def say(what, **variables):
  clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
  result = subprocess.run(
    [sys.executable, "-c", PROGRAM, what], env=clean | variables, capture_output=True, text=True, check=True
  )
  done, pages = result.stdout.split()
  return done, int(pages)


def test_what_is_freed_is_used_again():
  done, pages = say("keep")
  if done == "False":
    pytest.skip("not glibc")
  assert done == "True"
  _, without = say("leave")
  assert pages < without / 4


@pytest.mark.parametrize(
  "variables", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}], ids=lambda v: next(iter(v))
)
def test_the_environment_comes_first(variables):
  assert say("keep", **variables)[0] == "False"
