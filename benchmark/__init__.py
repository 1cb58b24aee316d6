"""What bench.py measures: the MoE layer, the training step, the loop, memory, data, ranks and GPUs."""
