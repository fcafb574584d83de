"""Instances: an engine, its pool and an HTTP server in one process."""
