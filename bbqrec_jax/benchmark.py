"""`python -m bbqrec_jax.benchmark` is `bbqrec benchmark`."""

import sys

from bbqrec_jax.commands import call

if __name__ == "__main__":
  call("benchmark", sys.argv[1:])
