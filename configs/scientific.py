"""Amazon-18 Scientific (8,317 users, 4,344 items), text and attributes.

python -m bbqrec_jax.main --config=configs/scientific.py --workdir=runs/scientific --config.data.path=DIR
"""

import ml_collections

from bbqrec_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
  """Both stages at the paper's sizes: four levels of 256 codes."""
  config = default_config()
  config.data.modalities = ("text", "attribute")
  return config
