"""Fitted data sets in the forms other programs read; each file whole or not at all."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from strainer_fast._checks import bad_input, check_choice
from strainer_fast._files import atomic_writer, check_writable
from strainer_fast.datasets.folder import parameter_shapes
from strainer_fast.datasets.reader import FittedDataset
from strainer_fast.signals import unique_names

FORMATS = ("npz", "hdf5", "state_dicts")
BLOCK = 1024
"""Networks held at once."""


def export(dataset: FittedDataset, path: str | Path, form: str | None = None) -> Path:
    """Write all networks of a data set in another form.

    Args:
        path: of a file, or of a folder for "state_dicts".
        form: "npz": arrays weights [n, D], names of the parameters and their shapes, index, source, psnr, steps;
            "hdf5" (needs h5py): the layout of fit-a-nef's SIREN, params [n, D] and param_config, kernels [in, out];
            "state_dicts": a folder with a file for torch.load per signal. By the ending of `path` without it.

    Raises InputError for signals that differ in channels (npz, hdf5), a form that needs a package that is not there,
    or a path that cannot be written.
    """
    path = Path(path)
    by_ending = {".npz": "npz", ".h5": "hdf5", ".hdf5": "hdf5", "": "state_dicts"}
    if form is None and path.suffix.lower() not in by_ending:
        raise bad_input("path", "an ending .npz, .hdf5 or none (a folder)", repr(path.name), "Or say the format.")
    form = check_choice("format", form or by_ending[path.suffix.lower()], FORMATS)
    if len(dataset) == 0:
        raise bad_input(str(dataset.folder), "at least one network", "none", "Fit some signals first.")
    check_writable(path if form == "state_dicts" else path.parent)
    if form == "state_dicts":
        _state_dicts(dataset, path)
    elif len({row.signal.channels for row in dataset.rows()}) > 1:
        raise bad_input(str(dataset.folder), "signals of one number of channels", "several", "Use state_dicts.")
    else:
        (_npz if form == "npz" else _hdf5)(dataset, path)
    return path


def _state_dicts(dataset: FittedDataset, folder: Path) -> None:
    for i in range(len(dataset)):
        row = dataset.row(i)
        name = unique_names([Path(row.source).stem])[0]
        with atomic_writer(folder / f"{row.index:07d}-{name}.pt") as file:
            torch.save(dataset.weights(i), file)


def _blocks(dataset: FittedDataset) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(dataset), BLOCK):
        yield dataset.flat_weights(range(start, min(start + BLOCK, len(dataset)))).numpy()


def _shapes(dataset: FittedDataset) -> dict[str, tuple[int, ...]]:
    signal = dataset.row(0).signal
    return parameter_shapes(dataset.architecture, len(signal.shape), signal.channels)


def _npz(dataset: FittedDataset, path: Path) -> None:
    shapes = _shapes(dataset)
    rows = list(dataset.rows())
    known: dict[str, NDArray[Any]] = {
        "names": np.array(list(shapes)),
        "shapes": np.array([json.dumps(shape) for shape in shapes.values()]),
        "omegas": np.array(dataset.architecture.omegas),
        "index": dataset.indices,
        "source": np.array([row.source for row in rows]),
        "psnr": np.array([row.signal.psnr for row in rows]),
        "steps": np.array([row.signal.steps for row in rows]),
    }
    columns = sum(int(np.prod(shape)) for shape in shapes.values())
    with atomic_writer(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in known.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            archive.writestr(f"{name}.npy", buffer.getvalue())
        with archive.open("weights.npy", "w", force_zip64=True) as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(dataset), columns)}
            np.lib.format.write_array_header_1_0(member, header)
            for block in _blocks(dataset):
                member.write(block.astype("<f4").tobytes())


def _hdf5(dataset: FittedDataset, path: Path) -> None:
    try:
        import h5py  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise bad_input("format", "one whose package is here", "hdf5 without h5py", "pip install h5py") from None
    config: list[tuple[str, list[int]]] = []
    order: list[tuple[int, int, tuple[int, ...]]] = []  # (begin, end, shape) of our parameters, in their order
    begins, at = {}, 0
    shapes = _shapes(dataset)
    for name, shape in shapes.items():
        begins[name] = at
        at += int(np.prod(shape))
    for layer in [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]:
        theirs = "output_linear" if layer == "head" else f"kernel_net_{layer.split('.')[1]}.linear"
        for kind, name in (("bias", f"{layer}.bias"), ("kernel", f"{layer}.weight")):
            config.append((f"{theirs}.{kind}", list(shapes[name])[::-1]))
            order.append((begins[name], begins[name] + int(np.prod(shapes[name])), shapes[name]))
    with atomic_writer(path) as file, h5py.File(file, "w") as archive:
        params = archive.create_dataset("params", (len(dataset), at), dtype="<f4")
        start = 0
        for block in _blocks(dataset):
            parts = [block[:, a:b].reshape(len(block), *shape) for a, b, shape in order]
            turned = [p.swapaxes(1, 2) if p.ndim == 3 else p for p in parts]
            params[start : start + len(block)] = np.concatenate([t.reshape(len(block), -1) for t in turned], 1)
            start += len(block)
        archive.create_dataset("param_config", data=[json.dumps(config)], dtype=h5py.string_dtype())
        archive.create_dataset("index", data=dataset.indices)
