"""What both stages are trained with: devices, loop, optimiser, checkpoints, logs."""
