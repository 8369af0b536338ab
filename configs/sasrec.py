"""SASRec with full cross-entropy: the baseline, on the data of any folder.

    python -m bbqrec_jax.main --config=configs/sasrec.py --workdir=runs/sasrec --config.data.path=DIR
    python -m bbqrec_jax.main --config=configs/sasrec.py:features --workdir=runs/sasrec --config.data.path=DIR

It knows items by number alone, or also by a linear map of their features; there is no tokenizer. Width, dropout and
optimiser are those of the dense head.
"""

import ml_collections

from bbqrec_jax.presets import system_config


def get_config(inputs: str = "item") -> ml_collections.ConfigDict:
  """The baseline.

  Args:
    inputs: "item", or "features" for both.
  """
  return system_config({"item": "sasrec", "features": "sasrec_features"}[inputs])
