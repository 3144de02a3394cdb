"""HTTP: the OpenAI-compatible server (docs/server.md)."""
