"""Cluster membership, the gateway's view of its members, and processes that run them."""
