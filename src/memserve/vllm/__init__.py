"""vLLM servers behind our instances: what computes there is vLLM, all else is ours."""
