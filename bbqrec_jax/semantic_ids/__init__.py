"""Semantic IDs as data: collision repair, health, the artefact on disk, the trie and the constrained beam search.

    from bbqrec_jax.semantic_ids import SemanticIds, beam_search, build_trie

What is here is imported when it is used.
"""

from bbqrec_jax.utils.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
  __name__,
  {
    "artefact": ["SemanticIds"],
    "beam": ["BeamResult", "beam_search", "item_log_probs"],
    "health": ["behaviour_cohesion", "codebook_health"],
    "repair": ["collision_rate", "reassign_collisions", "suffix_collisions"],
    "trie": ["Trie", "build_trie"],
  },
)
