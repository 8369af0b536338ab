"""Thin flax.linen shells over `ops`: they hold parameters and shapes, and no mathematics of their own."""
