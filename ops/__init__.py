"""Tensor operations of the MoE layer and the loss: dispatch, expert kernels, sums per expert, chunked cross-entropy."""
