"""Fits per second over whole data sets; `python -m strainer_fast.benchmarks.datasets --help`."""
