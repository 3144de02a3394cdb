"""Measurements: every table of the README comes from a command here, and leaves a dated row in results/."""
