"""SASRec with full cross-entropy: the baseline, on the data of any folder.

    python -m bbqrec_jax.main --config=configs/sasrec.py --workdir=runs/sasrec --config.data.path=DIR
    python -m bbqrec_jax.main --config=configs/sasrec.py:features --workdir=runs/sasrec --config.data.path=DIR

It knows items by number alone, or also by a linear map of their features; there is no tokenizer. Width, dropout and
optimiser are those of the dense head in `scientific.py`, not tuned for it.
"""

import ml_collections

from bbqrec_jax.config import default_config


def get_config(inputs: str = "item") -> ml_collections.ConfigDict:
  """The dense head of `scientific.py` without anything semantic.

  Args:
    inputs: "item", or "features" for both.
  """
  config = default_config()
  recommender = config.recommender
  recommender.head = "dense"
  recommender.item_inputs = {"item": ("item",), "features": ("features", "item")}[inputs]
  recommender.similarity = ()
  recommender.width = 128
  recommender.mlp_width = 512
  recommender.dropout = 0.5
  recommender.steps = 3000
  recommender.evaluate_every = 250
  return config
