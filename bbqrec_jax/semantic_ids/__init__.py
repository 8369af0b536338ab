"""Semantic IDs as data: collision repair, health, the artefact on disk, the trie and the constrained beam search."""
