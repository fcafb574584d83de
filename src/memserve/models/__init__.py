"""Where a model comes from: hub, directory or the demo packages; its tokenizer."""
