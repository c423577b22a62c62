"""Runs of the whole: options in, rows out."""
