"""TIGER's recipe: an RQ-VAE of the text alone, three codes and a suffix, a T5-style encoder and decoder over them.

    python -m bbqrec_jax.main --config=configs/tiger.py --workdir=runs/tiger --config.data.path=DIR
    python -m bbqrec_jax.main --config=configs/tiger.py:small --workdir=runs/tiger_small --config.data.path=DIR

The full shape (4 + 4 layers, d 128, 6 heads of 64, ff 1024) is for an accelerator; `small` is for a CPU, and is not
what TIGER's figures were measured with.
"""

import ml_collections

from bbqrec_jax.config import default_config

_SIZES = {
  "full": {
    "width": 128, "num_layers": 4, "num_heads": 6, "head_width": 64, "mlp_width": 1024, "batch_rows": 256,
    "steps": 20_000, "evaluate_every": 2000,
  },
  "small": {
    "width": 64, "num_layers": 2, "num_heads": 2, "head_width": 32, "mlp_width": 256, "batch_rows": 128,
    "steps": 4000, "evaluate_every": 500,
  },
}  # fmt: skip


def get_config(size: str = "full") -> ml_collections.ConfigDict:
  """The baseline: nothing is bound to behaviour, and attention is left as it is.

  Args:
    size: "full" or "small".
  """
  config = default_config()
  config.data.modalities = ("text",)
  tokenizer = config.tokenizer
  tokenizer.num_levels = 3
  tokenizer.repair = "suffix"
  tokenizer.item_id = "none"
  tokenizer.specific_dropout = 1.0
  tokenizer.weights.contrast = 0.0
  tokenizer.weights.modality_contrast = 0.0
  tokenizer.weights.disentangle = 0.0
  recommender = config.recommender
  recommender.backbone = "encoder_decoder"
  recommender.item_inputs = ("fused",)
  recommender.similarity = ()
  recommender.softmax_over = "all"
  recommender.subtree_logits = False
  recommender.seen_item_bias = False
  recommender.length_buckets = (2, 5, 10)
  recommender.dropout = 0.1
  recommender.update(_SIZES[size])
  config.evaluation.validation_users = 2048
  return config
