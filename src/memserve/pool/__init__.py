"""The memory of one instance: fixed-size KV blocks, their index, their tiers."""
