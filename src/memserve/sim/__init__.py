"""Simulator: the real scheduler and cost model with simulated instances, in virtual time."""
