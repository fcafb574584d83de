"""A whole cluster under mixed load for hours."""
