"""Whole data sets of networks: fitted at the speed of the machine, kept safe, read back."""

from strainer_fast.datasets.export import export
from strainer_fast.datasets.fit import DatasetProgress, fit_dataset
from strainer_fast.datasets.folder import Row
from strainer_fast.datasets.reader import FittedDataset
from strainer_fast.datasets.verify import Verification, verify

__all__ = ["DatasetProgress", "FittedDataset", "Row", "Verification", "export", "fit_dataset", "verify"]
