"""What `bbqrec benchmark` times: small (a laptop), paper (the paper's sizes), large (an accelerator).

bbqrec benchmark --config=configs/benchmark.py:small --output=small.json
"""

from bbqrec_jax.presets import benchmark_config as get_config

__all__ = ["get_config"]
