"""Finding a model (hub, directory or demo packages), its tokenizer and its chat template."""
