"""The paper's mathematics: arrays in, arrays out. No flax, no config, no input or output, no hidden randomness.

Shape letters: B batch, T history, N items, M modalities, S streams, L levels, K codes, d code width, H heads.
"""
