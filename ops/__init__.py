"""Tensor operations of the MoE layer and the loss: dispatch, expert kernels, chunked cross-entropy. Torch only."""
