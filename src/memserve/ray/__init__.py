"""The Ray backend: each process of a cluster belongs to an actor, on a node that Ray chooses."""
