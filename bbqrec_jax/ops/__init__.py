"""The paper's mathematics: arrays in, arrays out. No flax, no config, no input or output, no hidden randomness.

Shape letters: B batch, T history, N items, M modalities, S streams, L levels, K codes, d code width, H heads.

    from bbqrec_jax.ops import residual_quantize, straight_through
"""

from bbqrec_jax.ops.candidate_similarity import neighbour_scores, tail_edges, vector_scores
from bbqrec_jax.ops.club import club_full, gaussian_log_likelihood
from bbqrec_jax.ops.codebooks import code_counts, perplexity, revive_codes
from bbqrec_jax.ops.contrastive import info_nce, normalize
from bbqrec_jax.ops.kmeans import residual_kmeans
from bbqrec_jax.ops.quantize import (
  decode,
  finite_code,
  nearest_code,
  quantization_error,
  residual_quantize,
  straight_through,
)
from bbqrec_jax.ops.ranking import ndcg_at, ranking_metrics, recall_at, reciprocal_rank, target_ranks
from bbqrec_jax.ops.similarity import (
  bucket_bias,
  continuous_bias,
  equal_frequency_edges,
  pair_similarity,
  similarities,
  similarity_buckets,
)
from bbqrec_jax.ops.softmax import cross_entropy, sampled_cross_entropy, weighted_cross_entropy

__all__ = [
  "bucket_bias",
  "club_full",
  "code_counts",
  "continuous_bias",
  "cross_entropy",
  "decode",
  "equal_frequency_edges",
  "finite_code",
  "gaussian_log_likelihood",
  "info_nce",
  "ndcg_at",
  "nearest_code",
  "neighbour_scores",
  "normalize",
  "pair_similarity",
  "perplexity",
  "quantization_error",
  "ranking_metrics",
  "recall_at",
  "reciprocal_rank",
  "residual_kmeans",
  "residual_quantize",
  "revive_codes",
  "sampled_cross_entropy",
  "similarities",
  "similarity_buckets",
  "straight_through",
  "tail_edges",
  "target_ranks",
  "vector_scores",
  "weighted_cross_entropy",
]
