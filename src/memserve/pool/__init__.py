"""The KV memory of one instance: fixed-size blocks, their index, and their two media."""
