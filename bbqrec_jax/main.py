"""`python -m bbqrec_jax.main` is `bbqrec train`."""

import sys

from bbqrec_jax.commands import call

if __name__ == "__main__":
  call("train", sys.argv[1:])
