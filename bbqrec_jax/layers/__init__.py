"""Flax layers that both stages use."""
