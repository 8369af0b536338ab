"""Benchmarks that run on whatever JAX sees: what is timed, what it must cost, and how far from the limit it is."""
