"""Whole data sets of networks: fitted at the speed of the machine, kept safe, read back."""

from strainer_fast.datasets.fit import DatasetProgress, fit_dataset
from strainer_fast.datasets.folder import Row
from strainer_fast.datasets.reader import FittedDataset

__all__ = ["DatasetProgress", "FittedDataset", "Row", "fit_dataset"]
