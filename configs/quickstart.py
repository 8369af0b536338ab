"""The embedded default: synthetic data with planted tastes, both stages.

    python -m bbqrec_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Test Recall@10 / NDCG@10: 0.5375 / 0.2802 (popularity 0.0445 / 0.0206).
"""

from bbqrec_jax.presets import quickstart_config as get_config

__all__ = ["get_config"]
