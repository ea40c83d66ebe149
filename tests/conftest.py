"""Fixtures shared by all tests: small images, small networks, no dependence on the global random state."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import strainer_fast as sf


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # The networks here are too small to share, and threads that wait for a busy core cost milliseconds a call.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _can_be_interrupted() -> None:
    # A shell starts what it puts into the background with Ctrl-C ignored, and then nothing here could be stopped by it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny() -> sf.Architecture:
    """A network that fits in a blink."""
    return sf.Architecture(hidden_features=32, num_layers=4, num_shared_layers=3)


@pytest.fixture(scope="session")
def scans() -> list[sf.Signal]:
    """Ten real training scans, 16x16."""
    return sf.signals.samples("brain-mri", size=16)


@pytest.fixture(scope="session")
def unseen() -> list[sf.Signal]:
    """Scans of another head, 16x16."""
    return sf.signals.samples("brain-mri", "test", size=16)


@pytest.fixture(scope="session")
def encoder(scans: list[sf.Signal], tiny: sf.Architecture) -> sf.Encoder:
    """A trained encoder; do not modify."""
    return sf.pretrain(scans, sf.recipe("paper", pretrain_steps=60, pretrain_learning_rate=1e-3), architecture=tiny)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Three readable 12x10 grey images."""
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        pixels = generator.integers(0, 256, (12, 10), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder
