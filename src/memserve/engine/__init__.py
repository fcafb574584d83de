"""The built-in inference engine: PyTorch and Transformers over MemPool."""
