"""Any folder of the documented format.

    python -m bbqrec_jax.main --config=configs/directory.py --workdir=runs/mine --config.data.path=DIR

`--config.recommender.head=dense` trains the full softmax instead of the generative head, and
`--config.recommender.head=hybrid --config.recommender.dense_tower.width=128` both, as two towers: the best of all in
the README's tables, for the time of both. Time and figures depend on the folder; those of `scientific.py` are an
example.
"""

import ml_collections

from bbqrec_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
  """The defaults, on the folder that `data.path` names; items are known by a linear map of their features, too."""
  config = default_config()
  config.recommender.item_inputs = ("fused", "modalities", "features", "item")
  config.recommender.item_dropout = 0.2
  return config
