"""The process that clients talk to: OpenAI API in, instance calls out."""
