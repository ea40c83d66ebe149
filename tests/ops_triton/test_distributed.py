"""Pre-training shared by processes, each with the Triton stepper on its own signals."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import strainer_fast as sf
from tests.interpreter import interpret

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def trained(implementation: str, distributed: bool) -> sf.Encoder:
    signals = sf.signals.samples("brain-mri", size=8)[:3]
    recipe = sf.recipe("paper", pretrain_steps=4, check_every=2, pretrain_learning_rate=1e-3)
    network = sf.Architecture(16, 3, 2)
    return sf.pretrain(
        signals, recipe, architecture=network, implementation=implementation, device=DEVICE, distributed=distributed
    )


def rank_of_two(rank: int, folder: Path) -> None:
    if DEVICE == "cpu":
        interpret()  # decided anew in this process
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", world_size=2, rank=rank)
    trained("triton", True).save(folder / f"{rank}.safetensors")
    dist.destroy_process_group()


def test_two_processes_train_the_encoder_of_one(tmp_path: Path) -> None:
    mp.spawn(rank_of_two, (tmp_path,), nprocs=2)
    alone = trained("torch", False)
    for rank in range(2):
        shared = sf.Encoder.load(tmp_path / f"{rank}.safetensors")
        assert shared.record["psnr"] == pytest.approx(alone.record["psnr"], abs=1e-3)
        for p, q in zip(shared.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
