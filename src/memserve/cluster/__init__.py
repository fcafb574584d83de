"""Which instances there are, and processes that run them."""
