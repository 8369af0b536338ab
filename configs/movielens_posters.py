"""MovieLens-100K with its posters (943 users, 1,682 items): text and image, 15 % of the posters missing and masked out.

python -m bbqrec_jax.main --config=configs/movielens_posters.py --workdir=runs/posters --config.data.path=DIR

On two CPU cores, with another run beside it, about 6 minutes. Test Recall@10 / NDCG@10: 0.1803 / 0.0963
(popularity 0.0498 / 0.0220).
"""

import ml_collections

from bbqrec_jax.config import default_config
from bbqrec_jax.presets import packed_recipe


def get_config() -> ml_collections.ConfigDict:
  """Histories are long here (20 to 737), so rows hold 100 items."""
  config = packed_recipe(default_config())
  config.data.modalities = ("text", "image")
  config.tokenizer.num_codes = 128
  config.tokenizer.steps = 1000
  config.tokenizer.max_length = 50
  config.tokenizer.row_length = 50
  config.tokenizer.batch_rows = 8
  config.recommender.max_length = 100
  config.recommender.row_length = 100
  config.recommender.batch_rows = 16
  config.recommender.steps = 1500
  config.recommender.evaluate_every = 250
  return config
