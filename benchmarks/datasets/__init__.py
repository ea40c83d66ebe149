"""Fits per second over whole data sets; `python -m benchmarks.datasets --help`."""
