"""TIGER's recipe: an RQ-VAE of the text alone, three codes and a suffix, a T5-style encoder and decoder over them.

    python -m bbqrec_jax.main --config=configs/tiger.py --workdir=runs/tiger --config.data.path=DIR
    python -m bbqrec_jax.main --config=configs/tiger.py:small --workdir=runs/tiger_small --config.data.path=DIR

The full shape (4 + 4 layers, d 128, 6 heads of 64, ff 1024) is for an accelerator; `small` is for a CPU, and is not
what TIGER's figures were measured with.
"""

from bbqrec_jax.presets import tiger_config as get_config

__all__ = ["get_config"]
