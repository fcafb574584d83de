"""An engine, its pool and the server in front of them: one process."""
