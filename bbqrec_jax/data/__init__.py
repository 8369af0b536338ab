"""Histories and item features: read, checked, split, batched."""
