"""Grammars of answers: what clients send, compiled for a model's tokens."""
