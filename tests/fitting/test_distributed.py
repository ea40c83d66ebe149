"""Pre-training shared by processes: one process's result but for rounding, and its checkpoint."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import strainer_fast as sf
from strainer_fast.fitting.ranks import Ranks

STEPS = 12
NETWORK = sf.Architecture(hidden_features=24, num_layers=4, num_shared_layers=2)  # a decoder of two layers


def trained(changes: dict[str, object], folder: Path, distributed: bool, stop_at: int | None = None) -> sf.Encoder:
    """Five scans, which two ranks share unevenly; stop_at: leaves after that step as a kill would."""
    signals = sf.signals.samples("brain-mri", size=12)[:5]
    fields: dict[str, object] = {"pretrain_steps": STEPS, "check_every": 1, "pretrain_learning_rate": 1e-3} | changes

    def look(progress: sf.Progress) -> None:
        if progress.step == stop_at:
            raise RuntimeError("killed")

    checkpoint, resume = folder / "checkpoint", {"checkpoint_seconds": 0.0}
    return sf.pretrain(
        signals,
        sf.recipe("paper", **fields),
        architecture=NETWORK,
        checkpoint=checkpoint,
        distributed=distributed,
        on_check=look,
        **resume,
    )


def rank_of_two(rank: int, folder: Path, changes: dict[str, object], stop_at: int | None, name: str) -> None:
    """What each of two processes does; rank 0 keeps the encoder, or the error's text."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/{name}.store", world_size=2, rank=rank, timeout=timedelta(seconds=60)
    )
    try:
        trained(changes, folder, True, stop_at).save(folder / f"{name}-{rank}.safetensors")
    except (sf.InputError, RuntimeError) as error:
        (folder / f"{name}-{rank}.error").write_text(str(error))
    dist.destroy_process_group()


def on_two(folder: Path, changes: dict[str, object], stop_at: int | None = None, name: str = "shared") -> None:
    mp.spawn(rank_of_two, (folder, changes, stop_at, name), nprocs=2)


def difference(a: sf.Encoder, b: sf.Encoder) -> float:
    """Largest difference of a weight over the largest weight."""
    pairs = [*zip(a.parameters(), b.parameters(), strict=True)]
    pairs += [(a.decoders[name], b.decoders[name]) for name in a.decoders]
    return max(float((p - q).detach().abs().max() / q.detach().abs().max()) for p, q in pairs)


@pytest.mark.parametrize("optimiser", ["muon", pytest.param("adam", marks=pytest.mark.long)])
def test_two_processes_train_the_encoder_of_one_and_go_on(tmp_path: Path, optimiser: str) -> None:
    changes: dict[str, object] = {"pretrain_optimiser": optimiser}
    alone, whole, cut = (tmp_path / name for name in ("alone", "whole", "cut"))
    for folder in (alone, whole, cut):
        folder.mkdir()
    one = trained(changes, alone, False)
    on_two(whole, changes)
    two = [sf.Encoder.load(whole / f"shared-{rank}.safetensors") for rank in range(2)]
    assert difference(two[0], one) < 1e-4
    assert difference(two[0], two[1]) == 0
    assert two[0].record["psnr"] == pytest.approx(one.record["psnr"], abs=1e-3)
    assert two[0].record["signals"] == one.record["signals"]

    on_two(cut, changes, stop_at=STEPS // 2)
    assert (cut / "shared-0.error").read_text() == "killed"
    kept = (cut / "checkpoint").read_bytes()
    on_two(cut, changes, name="again")
    assert difference(sf.Encoder.load(cut / "again-0.safetensors"), two[0]) == 0
    (cut / "checkpoint").write_bytes(kept)
    assert difference(trained(changes, cut, False), two[0]) < 1e-4  # in one process


@pytest.mark.parametrize("changes", [{"pretrain_optimiser": "kfac"}, {"pretrain_method": "maml"}])
def test_recipes_that_need_all_signals_in_one_place_are_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str]
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(sf.InputError, match="strainer with adam or muon"):
        Ranks(5, True, sf.recipe("paper", **changes))
    with pytest.raises(sf.InputError, match="at most 1"):
        Ranks(1, True, sf.recipe("paper"))


def test_without_a_process_group_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(sf.InputError, match="init_process_group"):
        trained({}, tmp_path, True)


def test_torchrun_runs_the_command_line(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("strainer-fast")
    out = tmp_path / "encoder.safetensors"
    options = [
        "--size",
        "12",
        "--steps",
        "4",
        "--hidden-features",
        "16",
        "--device",
        "cpu",
        "--out",
        str(out),
        "--json",
    ]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run(
        [*run, str(program), "pretrain", "samples:brain-mri/train", *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(sf.Encoder.load(out).record["psnr"]) == 10
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(said) == 1  # one process speaks
    assert done.stderr.count("pre-training: 4 steps") == 1
