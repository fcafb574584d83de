"""What runs inside a vLLM server: its KV cache gets the pool behind it, as a tier in host memory.

`facade` is the class that vLLM loads, once in its scheduler and once in each worker, and holds no
logic. On the scheduler's side `scheduler` looks prompts up in a `MemPool` that has host memory
alone, orders copies, and publishes what was copied; `sequence` has what is known of one request.
On the workers' side `worker` maps the pool's memory and copies. `metadata` travels between them,
`layout` says what the blocks are. Only `facade` and `plugin` need vLLM to be imported.
"""
