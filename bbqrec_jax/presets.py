"""The systems that a config file offers by name, each the default config with what goes with it on any data."""

import ml_collections

from bbqrec_jax.config import default_config
from bbqrec_jax.errors import InputError

SASREC = {"sasrec": ("item",), "sasrec_features": ("features", "item")}  # What these know items by.
SYSTEMS = ("generative", "dense", "parallel", "hybrid", *SASREC)


def is_wide(system: str) -> bool:
  """Whether a system is wider than the default, as all are that score every item."""
  return system not in ("generative", "hybrid")


def system_config(system: str) -> ml_collections.ConfigDict:
  """The default config with a system's fields; items are known by a linear map of their features, too.

  Args:
    system: "generative", "dense", "parallel" or "hybrid", which is the first and "sasrec_features" in two towers.
      "sasrec" is the dense head without anything semantic, "sasrec_features" the same with the features.

  Raises:
    InputError: for any other name.
  """
  if system not in SYSTEMS:
    raise InputError(f"expected one of {', '.join(SYSTEMS)}, got {system!r}")
  config = default_config()
  recommender = config.recommender
  recommender.head = "dense" if system in SASREC else system
  recommender.item_inputs = SASREC.get(system, ("fused", "modalities", "features", "item"))
  recommender.item_dropout = 0.0 if system == "sasrec" else 0.2
  if system in SASREC:
    recommender.similarity = ()
  if is_wide(system):
    recommender.width = 128
    recommender.mlp_width = 512
  return config
