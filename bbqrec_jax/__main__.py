"""`python -m bbqrec_jax COMMAND` is `bbqrec COMMAND`."""

from bbqrec_jax.commands import main

if __name__ == "__main__":
  main()
