"""The package version, in the one place that both setuptools and checkpoints read."""

__version__ = "0.1.0"
