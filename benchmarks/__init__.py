"""Benchmarks: every row is checked against the reference before its time counts. Run with `make bench`."""
