"""The lab: claims of the papers run again, each by one command, `statespan lab NAME`.

An experiment (`experiment.py`) is a claim, its settings, and a function that runs one variant with one seed.
`session.py` runs what is missing and keeps it as JSON lines, `pages.py` writes tables, pictures and pages from them.
"""
