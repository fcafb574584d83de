"""A cluster's present activity, seen from outside: polls of its gateways, and rates between two.

No user interface and no state of the cluster's own: `memserve top` and `memserve dashboard` draw
what this package computes. Read `snapshot.py` first, then `rates.py`.
"""
