"""`python -m bbqrec_jax.export` is `bbqrec export`."""

import sys

from bbqrec_jax.commands import call

if __name__ == "__main__":
  call("export", sys.argv[1:])
