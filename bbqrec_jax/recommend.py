"""`python -m bbqrec_jax.recommend` is `bbqrec recommend`."""

import sys

from bbqrec_jax.commands import call

if __name__ == "__main__":
  call("recommend", sys.argv[1:])
