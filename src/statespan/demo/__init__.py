"""The demo: one command that trains a small hybrid on Python's own source, measures it honestly, and talks to it."""
