"""The global scheduler: which instance holds which prefix, predicted times, where a request runs.

No I/O and no torch: a gateway and the simulator run this code. Read `contract.py` first.
"""
