"""`python -m bbqrec_jax.report` is `bbqrec report`."""

import sys

from bbqrec_jax.commands import call

if __name__ == "__main__":
  call("report", sys.argv[1:])
