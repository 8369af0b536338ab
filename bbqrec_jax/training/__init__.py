"""The training machinery of both stages: partitioning over devices, loop, optimiser, checkpoints, logs."""
