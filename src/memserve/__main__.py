"""`python -m memserve`."""

from memserve.cli import main

main()
