"""Benchmarks on the devices that JAX sees: times, counted costs, and the share of the measured limits."""
