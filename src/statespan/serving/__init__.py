"""Serving: many requests share one model (docs/serving.md)."""
