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

import sys
from typing import TYPE_CHECKING

from bbqrec_jax.utils.lazy import lazy_names

if TYPE_CHECKING:
  from bbqrec_jax.config import default_config as default_config
  from bbqrec_jax.data.dataset import Dataset as Dataset
  from bbqrec_jax.data.encoding.encode import features as features
  from bbqrec_jax.data.preparation.prepare import prepare as prepare
  from bbqrec_jax.data.tables import load_data as load_data
  from bbqrec_jax.errors import InputError as InputError
  from bbqrec_jax.presets import preset as preset
  from bbqrec_jax.semantic_ids.artefact import SemanticIds as SemanticIds
  from bbqrec_jax.serving.run import Run as Run
  from bbqrec_jax.serving.run import load_run as load_run
  from bbqrec_jax.serving.run import run as run
  from bbqrec_jax.serving.run import tokenize as tokenize
  from bbqrec_jax.tokenizer.new_items import assign as assign

__version__ = "0.1.0"

__all__, __getattr__, __dir__ = lazy_names(
  __name__,
  {
    "config": ["default_config"],
    "data.dataset": ["Dataset"],
    "data.encoding.encode": ["features"],
    "data.preparation.prepare": ["prepare"],
    "data.tables": ["load_data"],
    "errors": ["InputError"],
    "presets": ["preset"],
    "semantic_ids.artefact": ["SemanticIds"],
    "serving.run": ["Run", "load_run", "run", "tokenize"],
    "tokenizer.new_items": ["assign"],
  },
)

if sys.argv[:1] == ["-m"]:  # So it is while `python -m bbqrec_jax.NAME` looks for the program.
  try:
    import jax  # noqa: F401
  except ValueError as error:  # A JAX_... variable of the environment has a value that JAX does not know.
    print(f"error: JAX cannot start: {error}; give the variable another value, or unset it", file=sys.stderr)
    sys.exit(2)
