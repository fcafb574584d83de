"""The KV connector inside a vLLM server: a pool in host memory as a tier behind vLLM's KV cache.

`facade` has the class that vLLM loads, once in its scheduler and once in each worker; it only
passes calls on. On the scheduler's side, `scheduler` looks prompts up in a `MemPool` without HBM,
orders copies, and publishes copied blocks; `sequence` has the state of one request. On the
workers' side, `worker` maps the pool's memory and copies. `metadata` has the messages between the
two sides, `layout` maps vLLM's KV cache to the pool's blocks. Of these modules only `facade`,
`origin` and `plugin` import vLLM.
"""
