"""Measurements: the tables of README.md and docs/measured.md come from commands here, which leave rows in results/."""
