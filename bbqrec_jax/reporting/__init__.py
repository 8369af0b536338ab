"""Figures of what a run learned."""
