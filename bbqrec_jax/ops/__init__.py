"""The paper's mathematics: arrays in, arrays out. No flax, no config, no input or output, no hidden randomness.

Shape letters: B batch, T history, N items, M modalities, S streams, L levels, K codes, d code width, H heads.

    from bbqrec_jax.ops import residual_quantize, straight_through
"""

from bbqrec_jax.utils.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
  __name__,
  {
    "candidate_similarity": ["neighbour_scores", "tail_edges", "vector_scores"],
    "club": ["club_full", "gaussian_log_likelihood"],
    "codebooks": ["code_counts", "perplexity", "revive_codes"],
    "contrastive": ["info_nce", "normalize"],
    "kmeans": ["residual_kmeans"],
    "quantize": [
      "decode", "finite_code", "nearest_code", "quantization_error", "residual_quantize", "straight_through",
    ],
    "ranking": ["ndcg_at", "ranking_metrics", "recall_at", "reciprocal_rank", "target_ranks"],
    "similarity": [
      "bucket_bias", "continuous_bias", "equal_frequency_edges", "pair_similarity", "similarities",
      "similarity_buckets",
    ],
    "softmax": ["cross_entropy", "sampled_cross_entropy", "weighted_cross_entropy"],
  },
)  # fmt: skip
