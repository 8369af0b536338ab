"""What `bbqrec_jax.benchmark` times: small (a laptop), paper (the paper's sizes), large (an accelerator).

python -m bbqrec_jax.benchmark --config=configs/benchmark.py:small --output=small.json
"""

from typing import Any

import ml_collections

from bbqrec_jax.config import default_config

# Of the recommender: width, layers, heads, rows and length of a batch; of the data: items, width of a modality.
_SIZES = {
  "small": {"width": 64, "layers": 2, "heads": 2, "rows": 16, "length": 50, "items": 5_000, "features": 384},
  "paper": {"width": 128, "layers": 2, "heads": 2, "rows": 64, "length": 50, "items": 12_101, "features": 768},
  "large": {"width": 1024, "layers": 8, "heads": 16, "rows": 256, "length": 64, "items": 100_000, "features": 768},
}


def get_config(size: str = "small") -> ml_collections.ConfigDict:
  """Sizes and windows, and the config of the run whose parts are timed.

  Args:
    size: "small", "paper" or "large".
  """
  chosen = _SIZES[size]
  config = ml_collections.ConfigDict()
  config.name = size
  config.num_users = 20_000  # Of random histories, 3 items or more, 8 on average.
  config.num_items = chosen["items"]
  config.modalities = {"text": chosen["features"], "image": chosen["features"]}  # Name: width.
  config.tokenized = 2048  # Items in a call of tokenization, as many as the program encodes of a catalogue at once.
  config.windows = 10  # Timed windows of each benchmark.
  config.window_seconds = 0.3  # About how long each is.

  config.run = run = default_config()
  run.tokenizer.batch_items = 1024
  run.tokenizer.batch_rows = 32
  recommender = run.recommender
  recommender.width = chosen["width"]
  recommender.mlp_width = 4 * chosen["width"]
  recommender.num_layers = chosen["layers"]
  recommender.num_heads = chosen["heads"]
  recommender.batch_rows = chosen["rows"]
  recommender.max_length = recommender.row_length = chosen["length"]
  run.evaluation.batch_size = 64
  if size == "large":
    recommender.dtype = "bfloat16"
    run.tokenizer.batch_items = 8192
  # TIGER's shape, or a quarter of it: fields of `run.recommender`.
  shape: dict[str, Any] = {
    "width": 64,
    "num_layers": 2,
    "num_heads": 2,
    "head_width": 32,
    "mlp_width": 256,
    "batch_rows": 16,
  }
  if size != "small":
    shape = {"width": 128, "num_layers": 4, "num_heads": 6, "head_width": 64, "mlp_width": 1024, "batch_rows": 64}
  shape |= {"max_length": 20, "row_length": 20, "softmax_over": "all", "subtree_logits": False, "seen_item_bias": False}
  config.encoder_decoder = shape
  return config
