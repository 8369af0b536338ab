"""`python -m bbqrec_jax.assign` is `bbqrec assign`."""

import sys

from bbqrec_jax.commands import call

if __name__ == "__main__":
  call("assign", sys.argv[1:])
