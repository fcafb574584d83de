"""Real requests for benchmarks and for the simulator, read from the public data sets."""
