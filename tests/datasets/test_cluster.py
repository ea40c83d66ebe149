"""Data sets fitted by the workers of a Ray cluster on this machine."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import strainer_fast as sf
from strainer_fast.datasets import verify

pytestmark = pytest.mark.long
ray = pytest.importorskip("ray")

NETWORK = sf.Architecture(16, 3, 2)
WORKERS = 3
IMAGES = np.random.default_rng(0).integers(0, 256, (60, 10, 10), dtype=np.uint8)


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    ray.init(num_cpus=WORKERS, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


def fitted(out: Path, steps: int = 60, images: np.ndarray = IMAGES, **more: object) -> sf.FittedDataset:
    recipe = sf.recipe("small", steps=steps)
    return sf.fit_dataset(images, out, "shared", recipe, architecture=NETWORK, **more)


def by_index(dataset: sf.FittedDataset) -> dict[int, tuple[float, torch.Tensor]]:
    rows = zip(dataset.rows(), dataset.flat_weights(), strict=True)
    return {row.index: (row.signal.psnr, vector) for row, vector in rows}


def test_workers_give_the_bits_of_one_process(tmp_path: Path) -> None:
    seen: list[int] = []
    spread = fitted(tmp_path / "ray", engine="ray", workers=WORKERS, on_progress=lambda p: seen.append(p.finished))
    alone = fitted(tmp_path / "alone")
    assert len(list((tmp_path / "ray" / "shards").iterdir())) == WORKERS
    assert by_index(spread).keys() == by_index(alone).keys() == set(range(60))
    for index, (psnr, vector) in by_index(spread).items():
        assert psnr == by_index(alone)[index][0]
        assert torch.equal(vector, by_index(alone)[index][1])
    assert max(seen) <= 60


def test_a_killed_worker_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "killed"
    victims: list[int] = []

    def kill() -> None:
        """Two workers, a moment apart, while they fit."""
        while len(victims) < 2:
            time.sleep(0.2)
            parts = list((out / "shards").glob("*.part")) if (out / "shards").exists() else []
            if sum(p.stat().st_size for p in parts) == 0:
                continue
            for entry in Path("/proc").iterdir():
                if entry.name.isdigit() and int(entry.name) not in victims:
                    try:
                        title = (entry / "cmdline").read_bytes()
                    except OSError:
                        continue
                    if title.startswith(b"ray::_fit_part"):
                        os.kill(int(entry.name), signal.SIGKILL)
                        victims.append(int(entry.name))
                        break

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    images = np.random.default_rng(1).integers(0, 256, (300, 16, 16), dtype=np.uint8)
    dataset = fitted(out, 3000, images, engine="ray", workers=WORKERS, num_parallel=2)
    assert len(victims) == 2
    assert sorted(row.index for row in dataset.rows()) == list(range(300))
    found = verify(dataset, images)
    assert found.passed and found.checked == 300


def test_another_number_of_workers_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "networks"
    fitted(out, images=IMAGES, engine="ray", workers=2)
    again = fitted(out, engine="ray", workers=3, resume=True)
    assert len(again) == 60
    with pytest.raises(sf.InputError, match="holds a data set"):
        fitted(out, engine="ray")
    with pytest.raises(sf.InputError, match="recipe"):
        fitted(out, 50, engine="ray", resume=True)
    assert len(fitted(out, 50, engine="ray", overwrite=True)) == 60


def test_what_workers_cannot_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sf.InputError, match="read again"):
        sf.fit_dataset(iter(IMAGES[:3]), tmp_path, "shared", "small", architecture=NETWORK, engine="ray")
    with pytest.raises(sf.InputError, match="shard"):
        fitted(tmp_path, engine="ray", shard=(0, 2))
    assert not list(tmp_path.iterdir())
