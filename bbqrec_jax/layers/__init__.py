"""Layers that both stages are built of."""
