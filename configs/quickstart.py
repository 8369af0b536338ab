"""The embedded default: synthetic data with planted tastes, both stages, one to three minutes on two CPU cores.

    python -m bbqrec_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Test Recall@10 / NDCG@10: 0.5450 / 0.2788 (popularity 0.0445 / 0.0206).
"""

import ml_collections

from bbqrec_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
  """2,000 users, 600 items, two modalities; small codebooks, a small sequence model."""
  config = default_config()
  config.data.source = "synthetic"
  config.tokenizer.num_codes = 64
  config.tokenizer.num_levels = 3
  config.tokenizer.hidden = (128, 64)
  config.tokenizer.steps = 800
  config.tokenizer.warmup_steps = 100
  config.tokenizer.batch_items = 256
  config.tokenizer.batch_rows = 8
  config.tokenizer.evaluate_every = 400
  config.recommender.steps = 1200
  config.recommender.evaluate_every = 300
  return config
