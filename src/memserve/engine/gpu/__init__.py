"""The built-in engine's code for GPUs: Triton kernels, CUDA graphs, sampling in one batch."""
