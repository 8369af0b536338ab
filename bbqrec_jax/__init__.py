"""BBQRec in JAX: behaviour-bind quantization for multi-modal sequential recommendation."""

import sys

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # So it is while `python -m bbqrec_jax.NAME` looks for the program.
  try:
    import jax  # noqa: F401
  except ValueError as error:  # A JAX_... variable of the environment has a value that JAX does not know.
    print(f"error: JAX cannot start: {error}; give the variable another value, or unset it", file=sys.stderr)
    sys.exit(2)
