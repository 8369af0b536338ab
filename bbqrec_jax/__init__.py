"""BBQRec in JAX: behaviour-bind quantization for multi-modal sequential recommendation.

    import bbqrec_jax

    config = bbqrec_jax.preset("quickstart")  # Fields can be set: config.recommender.steps = 500
    run = bbqrec_jax.run(config, "runs/quickstart")
    run.results["test"]["ndcg@10"]
    run.recommend([[3, 17, 256]], k=5)

`load_data` reads a folder, DataFrames or arrays, to be given as `run(..., data=...)`; `load_run` reads a finished run.
What is here is imported when it is used: importing the package itself costs nothing. The mathematics can be imported by
itself from `bbqrec_jax.ops`, and what is made of semantic IDs from `bbqrec_jax.semantic_ids`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from bbqrec_jax.config import default_config
  from bbqrec_jax.data.dataset import Dataset
  from bbqrec_jax.data.encoding.encode import features
  from bbqrec_jax.data.preparation.prepare import prepare
  from bbqrec_jax.data.tables import load_data
  from bbqrec_jax.errors import InputError
  from bbqrec_jax.presets import preset
  from bbqrec_jax.serving.run import Run, load_run, run, tokenize
  from bbqrec_jax.tokenizer.new_items import assign

import sys

__version__ = "0.1.0"

__all__ = [
  "Dataset",
  "InputError",
  "Run",
  "assign",
  "default_config",
  "features",
  "load_data",
  "load_run",
  "prepare",
  "preset",
  "run",
  "tokenize",
]

_MODULES = {
  "Dataset": "data.dataset",
  "InputError": "errors",
  "Run": "serving.run",
  "assign": "tokenizer.new_items",
  "default_config": "config",
  "features": "data.encoding.encode",
  "load_data": "data.tables",
  "load_run": "serving.run",
  "prepare": "data.preparation.prepare",
  "preset": "presets",
  "run": "serving.run",
  "tokenize": "serving.run",
}


def __getattr__(name: str) -> Any:
  """Imports a name of the public API when it is asked for."""
  if name not in _MODULES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
  return [*globals(), *__all__]


if sys.argv[:1] == ["-m"]:  # So it is while `python -m bbqrec_jax.NAME` looks for the program.
  try:
    import jax  # noqa: F401
  except ValueError as error:  # A JAX_... variable of the environment has a value that JAX does not know.
    print(f"error: JAX cannot start: {error}; give the variable another value, or unset it", file=sys.stderr)
    sys.exit(2)
