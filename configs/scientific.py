"""Amazon-18 Scientific (8,317 users, 4,344 items), text and attributes; any head.

    python -m bbqrec_jax.main --config=configs/scientific.py --workdir=runs/scientific --config.data.path=DIR
    python -m bbqrec_jax.main --config=configs/scientific.py:dense --workdir=runs/dense --config.data.path=DIR

The recipe of the tables in docs/results, for this data alone; `--config=hybrid` and the like need no such settings.
On two CPU cores, with another run beside it, 6 (dense), 9 (generative) and 17 minutes (hybrid).
Test Recall@10 / NDCG@10, means of three seeds: generative 0.1172 / 0.0796, dense 0.1207 / 0.0828, hybrid
0.1295 / 0.0881 (popularity 0.0231 / 0.0162).
"""

import ml_collections

from bbqrec_jax.presets import is_wide, packed_recipe, system_config

STEPS = {"generative": 3000, "dense": 1500, "parallel": 2500, "hybrid": 3000, "sasrec": 3000, "sasrec_features": 3000}


def get_config(system: str = "generative") -> ml_collections.ConfigDict:
  """Both stages at the paper's sizes, four levels of 256 codes.

  Args:
    system: see `system_config`. All but the generative head and the hybrid have more dropout.
  """
  config = packed_recipe(system_config(system))
  config.data.modalities = ("text", "attribute")
  config.recommender.steps = STEPS[system]
  if is_wide(config.recommender):
    config.recommender.dropout = 0.5
    config.recommender.evaluate_every = 250
  return config
