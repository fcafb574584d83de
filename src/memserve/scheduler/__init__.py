"""The global scheduler: who holds which prefix, what everything costs, where a request runs.

No I/O and no torch: a gateway and the simulator run the same code. `contract.py` comes first.
"""
