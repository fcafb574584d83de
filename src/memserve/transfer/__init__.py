"""Moving KV blocks between the pools of instances."""
