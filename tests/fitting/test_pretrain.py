"""Pre-training: resume to the bit after a real kill, refusals, files."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import strainer_fast as sf

RUN = """
import sys, torch
import strainer_fast as sf
torch.set_num_threads(1)
encoder = sf.pretrain(
    sf.signals.samples("brain-mri", size=24)[:3],
    sf.recipe("paper", pretrain_steps=120, check_every=3),
    architecture=sf.Architecture(48, 5, 3, omega=(30.0, 20.0, 20.0, 10.0)),
    checkpoint=sys.argv[1],
    checkpoint_seconds=0.0,
    on_check=lambda p: print(p.step, flush=True),
)
encoder.save(sys.argv[2])
"""


def start(checkpoint: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(checkpoint), str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_runs_end_with_the_same_bits(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.checkpoint"
    whole = start(tmp_path / "other.checkpoint", tmp_path / "whole.safetensors")
    kills = 0
    for wait in (20, 35):  # steps to see before the kill; each later run begins where the last one was
        process = start(checkpoint, tmp_path / "killed.safetensors")
        seen = []
        for line in process.stdout:
            seen.append(int(line))
            if len(seen) * 3 > wait:
                break
        time.sleep(0.003 * kills)  # another moment within the step
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()
        kills += process.returncode == -signal.SIGKILL
        assert seen[0] == 0 or seen[0] > 3
    assert kills == 2
    assert not (tmp_path / "killed.safetensors").exists()
    last = start(checkpoint, tmp_path / "killed.safetensors")
    out, err = last.communicate()
    assert last.returncode == 0, err
    assert int(out.split()[0]) > 35  # it did continue
    whole.communicate()
    a, b = sf.Encoder.load(tmp_path / "whole.safetensors"), sf.Encoder.load(tmp_path / "killed.safetensors")
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert all(torch.equal(a.decoders[n], b.decoders[n]) for n in a.decoders)
    assert a.record["psnr"] == b.record["psnr"]


def test_ctrl_c_leaves_a_checkpoint(scans: list[sf.Signal], tiny: sf.Architecture, tmp_path: Path) -> None:
    recipe, path = sf.recipe("paper", pretrain_steps=40), tmp_path / "run.checkpoint"

    def press(progress: sf.Progress) -> None:
        if progress.step == 20:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    with pytest.raises(sf.Interrupted, match=r"interrupted at step 21 of 40\. Kept in .*run\.checkpoint"):
        sf.pretrain(scans, recipe, architecture=tiny, checkpoint=path, on_check=press)
    resumed = sf.pretrain(scans, recipe, architecture=tiny, checkpoint=path)
    whole = sf.pretrain(scans, recipe, architecture=tiny)
    assert resumed.fingerprint() == whole.fingerprint()
    with pytest.raises(sf.Interrupted, match="Nothing was kept"):
        sf.pretrain(scans, recipe, architecture=tiny, on_check=press)


def test_a_checkpoint_of_another_run_is_refused(scans: list[sf.Signal], tiny: sf.Architecture, tmp_path: Path) -> None:
    path = tmp_path / "run.checkpoint"
    stop = iter(range(100))

    def fail(progress: sf.Progress) -> None:
        if next(stop) == 2:
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        sf.pretrain(
            scans,
            sf.recipe("paper", pretrain_steps=40),
            architecture=tiny,
            checkpoint=path,
            checkpoint_seconds=0,
            on_check=fail,
        )
    with pytest.raises(
        sf.InputError,
        match=r"unfinished run run.checkpoint: .*got recipe\.pretrain_steps 40 -> 41\. .*delete .*run.checkpoint",
    ):
        sf.pretrain(scans, sf.recipe("paper", pretrain_steps=41), architecture=tiny, checkpoint=path)
    with pytest.raises(sf.InputError, match="fingerprints"):
        sf.pretrain(scans[::-1], sf.recipe("paper", pretrain_steps=40), architecture=tiny, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(sf.InputError, match="a complete safetensors file"):
        sf.pretrain(scans, sf.recipe("paper", pretrain_steps=40), architecture=tiny, checkpoint=path)


def test_another_thread_count_is_said(scans: list[sf.Signal], tiny: sf.Architecture, tmp_path: Path) -> None:
    path, threads = tmp_path / "run.checkpoint", torch.get_num_threads()
    sf.pretrain(
        scans,
        sf.recipe("paper", pretrain_steps=20, check_every=5),
        architecture=tiny,
        checkpoint=path,
        checkpoint_seconds=0,
    )
    assert path.exists()
    try:
        torch.set_num_threads(threads + 1)
        with pytest.warns(UserWarning, match="will not have the same bits"):
            sf.pretrain(scans, sf.recipe("paper", pretrain_steps=20, check_every=5), architecture=tiny, checkpoint=path)
    finally:
        torch.set_num_threads(threads)


def test_different_sizes_and_channels_are_refused(scans: list[sf.Signal]) -> None:
    small, colour = sf.signals.samples("brain-mri", size=(8, 9))[0], sf.signals.samples("photos", size=16)[0]
    with pytest.raises(sf.InputError, match=r"16x16x1 \(mni152_z051, .*8x9x1 .*--size"):
        sf.pretrain([*scans, small])
    with pytest.raises(sf.InputError, match=r"16x16x3 \(air-balloon\).*--channels"):
        sf.pretrain([*scans, colour])


def test_one_signal_is_enough(scans: list[sf.Signal], tiny: sf.Architecture) -> None:
    encoder = sf.pretrain(scans[0], sf.recipe("paper", pretrain_steps=5), architecture=tiny)
    assert encoder.decoders["head.weight"].shape == (1, 1, 32)
    assert encoder.record["signals"] == ["mni152_z051"]
    assert encoder.record["coordinates"].startswith("[-1, 1]")
    assert encoder.record["value_range"] == [0.0, 255.0]
