"""Workloads for benchmarks and the simulator: from public data sets, traces, and synthetic."""
