"""Workloads, the load generator, microbenchmarks and their reports."""
