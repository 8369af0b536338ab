"""Amazon-14 Beauty (22,363 users, 12,101 items), text and attributes: the split of TIGER, LETTER and S3-Rec.

    python -m bbqrec_jax.main --config=configs/beauty.py --workdir=runs/beauty --config.data.path=DIR
    python -m bbqrec_jax.main --config=configs/beauty.py:dense --workdir=runs/dense --config.data.path=DIR

On two CPU cores, with another run beside it, 20 to 30 minutes (hybrid 45), 8 of them the tokenizer. Test Recall@10 /
NDCG@10, means of three seeds: generative 0.0962 / 0.0547, dense 0.1067 / 0.0635, hybrid 0.1100 / 0.0652 (popularity
0.0106 / 0.0051).
"""

import ml_collections

from bbqrec_jax.presets import packed_recipe, system_config

STEPS = {"generative": 6000, "dense": 3500, "parallel": 3500, "hybrid": 5000, "sasrec": 3500, "sasrec_features": 5000}


def get_config(system: str = "generative") -> ml_collections.ConfigDict:
  """As `scientific.py`, with longer training for three times the histories.

  The contrast is sharper and the item IDs are freer: here behaviour says more that the features do not.

  Args:
    system: see `system_config`.
  """
  config = packed_recipe(system_config(system))
  config.data.modalities = ("text", "attribute")
  config.tokenizer.temperature = 0.2
  config.tokenizer.level_dropout = 0.75
  config.tokenizer.weights.item_id = 0.005
  config.tokenizer.steps = 4000
  config.tokenizer.evaluate_every = 1000
  config.recommender.steps = STEPS[system]
  config.recommender.evaluate_every = 1000 if system == "generative" else 500
  config.recommender.optimizer.weight_decay = 0.1 if system == "generative" else 0.3
  config.evaluation.validation_users = 8192
  if system == "hybrid":
    config.recommender.dense_tower.dropout = 0.3
  return config
