"""The walk of a request: modules and classes that it passes, in the order in which it does."""
