"""vLLM servers as engines of instances, and the KV connector that runs inside vLLM."""
