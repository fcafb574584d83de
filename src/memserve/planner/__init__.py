"""Planner: which roles, and how many members, keep a cluster inside its latency objectives."""
