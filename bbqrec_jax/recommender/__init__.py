"""Stage 2, the semantics-aware sequence model: items, backbones, heads, training, ranking."""
