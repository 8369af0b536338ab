"""Training: pure steps, the partitioner seam, the loop, checkpoints and logs."""
