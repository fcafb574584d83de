"""What the built-in engine has for GPUs alone: Triton kernels, CUDA graphs, sampling in one batch."""
