"""Hostile input by the hundred thousand; `scripts/fuzz.py` runs any of the targets for long."""
