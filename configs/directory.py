"""Any folder of the documented format, with any head.

    python -m bbqrec_jax.main --config=configs/directory.py --workdir=runs/mine --config.data.path=DIR
    python -m bbqrec_jax.main --config=configs/directory.py:hybrid --workdir=runs/hybrid --config.data.path=DIR

`:generative` (the default), `:dense` (full softmax), `:parallel`, `:hybrid` (generative and dense as two towers: the
best of all in the README's tables, for the time of both), `:sasrec` and `:sasrec_features` (the baselines). Time and
figures depend on the folder; those of `scientific.py` are an example.
"""

import ml_collections

from bbqrec_jax.presets import system_config


def get_config(system: str = "generative") -> ml_collections.ConfigDict:
  """The defaults of a system, on the folder that `data.path` names."""
  return system_config(system)
