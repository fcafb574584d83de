"""What a GPU gives: steps of the built-in engine beside `generate`, and copies of the pool."""
