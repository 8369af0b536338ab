"""Amazon-18 Scientific (8,317 users, 4,344 items), text and attributes; any head.

    python -m bbqrec_jax.main --config=configs/scientific.py --workdir=runs/scientific --config.data.path=DIR
    python -m bbqrec_jax.main --config=configs/scientific.py:dense --workdir=runs/dense --config.data.path=DIR

On two CPU cores, with another run beside it, 6 (dense), 9 (generative) and 17 minutes (hybrid).
Test Recall@10 / NDCG@10, means of three seeds: generative 0.1172 / 0.0796, dense 0.1207 / 0.0828, hybrid
0.1295 / 0.0881 (popularity 0.0231 / 0.0162).
"""

import ml_collections

from bbqrec_jax.config import default_config

SASREC = {"sasrec": ("item",), "sasrec_features": ("features", "item")}  # What these know items by.
STEPS = {"generative": 3000, "dense": 1500, "parallel": 2500, "hybrid": 3000, "sasrec": 3000, "sasrec_features": 3000}


def get_config(head: str = "generative") -> ml_collections.ConfigDict:
  """Both stages at the paper's sizes, four levels of 256 codes; items are known by a linear map of their features, too.

  Args:
    head: "generative", "dense", "parallel" or "hybrid", which is the first and "sasrec_features" in two towers.
      "sasrec" is the dense head without anything semantic, "sasrec_features" the same with the features. All but the
      generative head are wider, and have more dropout.
  """
  config = default_config()
  config.data.modalities = ("text", "attribute")
  config.recommender.head = "dense" if head in SASREC else head
  config.recommender.item_inputs = SASREC.get(head, ("fused", "modalities", "features", "item"))
  config.recommender.item_dropout = 0.0 if head == "sasrec" else 0.2
  config.recommender.steps = STEPS[head]
  if head == "hybrid":
    config.recommender.dense_tower.width = 128
  if head in SASREC:
    config.recommender.similarity = ()
  if head not in ("generative", "hybrid"):
    config.recommender.width = 128
    config.recommender.mlp_width = 512
    config.recommender.dropout = 0.5
    config.recommender.evaluate_every = 250
  return config
