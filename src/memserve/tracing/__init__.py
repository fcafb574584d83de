"""Traces of requests: contexts (`context`), spans (`span`), and their export by OTLP (`otlp`)."""
