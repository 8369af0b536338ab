"""Amazon-14 Beauty (22,363 users, 12,101 items), text and attributes: the split of TIGER, LETTER and S3-Rec.

python -m bbqrec_jax.main --config=configs/beauty.py --workdir=runs/beauty --config.data.path=DIR
"""

import ml_collections

from bbqrec_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
  """As `scientific.py`, with longer training for the larger catalogue."""
  config = default_config()
  config.data.modalities = ("text", "attribute")
  config.tokenizer.steps = 3000
  config.recommender.steps = 8000
  config.recommender.evaluate_every = 1000
  return config
