"""A fitted data set, read from its folder: networks one by one, as vectors, for training, or exported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from strainer_fast._checks import bad_input
from strainer_fast.datasets import folder as files
from strainer_fast.datasets.folder import Row, flat
from strainer_fast.models import Architecture, Siren
from strainer_fast.models.siren import siren_from_rows

KEPT_SHARDS = 32
"""Shards that are kept open: neighbours lie in as many, where as many processes have filled a folder."""


def _make_room(kept: dict[int, Any]) -> None:
    if len(kept) >= KEPT_SHARDS:
        del kept[next(iter(kept))]


class FittedDataset(Dataset[Siren]):
    """Networks that `fit_dataset` left in a folder; `dataset[i]` is the Siren of the i-th fitted signal.

    Signals count in the order of their source; those that were skipped, or are not fitted yet, are not there:
    `indices` has their places in the source. Networks are read when they are asked for. Works as a PyTorch Dataset.

    Args:
        path: the folder.

    Attributes:
        settings: recipe, initialisation, architecture, source and environment, plain JSON data.
        indices: place in the source of each fitted signal, int64 [len].

    Raises InputError for a folder without a data set or with damaged files.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)
        self.settings: dict[str, Any] = files.read_manifest(self.folder)
        self.architecture = Architecture(**self.settings["architecture"])
        self._paths = files.shard_paths(self.folder)
        indices, shards, places = [], [], []
        for number, shard in enumerate(self._paths):
            own = [row.index for row in files.read_rows(shard)]
            indices.append(np.array(own, dtype=np.int64))
            shards.append(np.full(len(own), number, dtype=np.int32))
            places.append(np.arange(len(own), dtype=np.int32))
        nothing = np.zeros(0, dtype=np.int64)
        unsorted = np.concatenate(indices or [nothing])
        order = np.argsort(unsorted, kind="stable")
        self.indices: NDArray[np.int64] = unsorted[order]
        self._shards: NDArray[np.int32] = np.concatenate(shards or [nothing.astype(np.int32)])[order]
        self._places: NDArray[np.int32] = np.concatenate(places or [nothing.astype(np.int32)])[order]
        self._opened: dict[int, Any] = {}
        self._known: dict[int, list[Row]] = {}

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        return f"FittedDataset({str(self.folder)!r}): {len(self)} networks, {self.architecture}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}  # workers of a DataLoader open files of their own

    def __getitem__(self, index: int) -> Siren:
        return siren_from_rows(self.weights(index), self.architecture.omegas)

    def weights(self, index: int) -> dict[str, Tensor]:
        """Parameters of one network by name, as Siren.state_dict()."""
        shard, place = self._find(index)
        if shard not in self._opened:
            files.read_rows(self._paths[shard])  # that it is ours and whole
            _make_room(self._opened)
            self._opened[shard] = safe_open(self._paths[shard], framework="pt")
        file = self._opened[shard]
        names = files.parameter_shapes(self.architecture, 1, 1)
        return {name: file.get_slice(name)[place : place + 1][0] for name in names}

    def row(self, index: int) -> Row:
        """Index and source of a signal, and what is known of its fit."""
        shard, place = self._find(index)
        if shard not in self._known:
            _make_room(self._known)
            self._known[shard] = files.read_rows(self._paths[shard])
        return self._known[shard][place]

    def rows(self) -> Iterator[Row]:
        """All of them, in the order of the source."""
        return (self.row(i) for i in range(len(self)))

    def flat_weights(self, indices: Sequence[int] | None = None) -> Tensor:  # [n, D]
        """Networks as vectors, in the order of torch's parameters_to_vector(dataset[i].parameters()).

        Args:
            indices: which; all by default, 4 D bytes each.

        Raises InputError where signals differ in channels, so that vectors differ in length.
        """
        chosen = range(len(self)) if indices is None else indices
        vectors: list[Tensor | None] = [None] * len(chosen)
        by_shard: dict[int, list[int]] = {}
        for at, index in enumerate(chosen):
            by_shard.setdefault(self._find(index)[0], []).append(at)
        for shard, members in by_shard.items():
            everything = flat(self._ordered(files.read_shard(self._paths[shard])[0]))
            for at in members:
                vectors[at] = everything[self._find(chosen[at])[1]].clone()
        found = [v for v in vectors if v is not None]
        if len({len(v) for v in found}) > 1:
            raise bad_input("flat_weights", "signals of one number of channels", "several", "Pass indices of one.")
        return torch.stack(found) if found else torch.zeros(0, 0)

    def _ordered(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: weights[name] for name in files.parameter_shapes(self.architecture, 1, 1)}

    def _find(self, index: int) -> tuple[int, int]:
        """(shard, place in it)"""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} networks")
        return int(self._shards[index]), int(self._places[index])
