"""Whole data sets: every signal gets its network, whatever happens on the way, and no fit depends on the others."""

import contextlib
import csv
import errno
import gc
import itertools
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import strainer_fast as sf
from strainer_fast.datasets import DatasetProgress, FittedDataset, fit_dataset, verify
from strainer_fast.datasets import fit as fit_module
from strainer_fast.datasets import folder as files
from strainer_fast.datasets.journal import Journal, records
from strainer_fast.datasets.writer import open_writer

NETWORK = sf.Architecture(16, 3, 2)
GIVEN = {"architecture": NETWORK, "shard_rows": 8}


def quick(**changes: object) -> sf.Recipe:
    return sf.recipe("small", **{"steps": 12, "check_every": 1} | changes)


@pytest.fixture(scope="module")
def images() -> list[sf.Signal]:
    """Twenty real scans, 8x8, halves of which are each other's mirror images."""
    scans = sf.signals.samples("brain-mri", size=8)
    mirrored = [sf.Signal(s.values.flip(1), f"{s.name}-mirrored") for s in scans]
    return [*scans, *mirrored]


def networks(dataset: FittedDataset) -> torch.Tensor:
    return dataset.flat_weights()


@pytest.mark.parametrize("implementation", ["auto", "tiled"])
@pytest.mark.parametrize("init", ["siren", "shared", "encoder", "heads", "meta"])
def test_every_signal_is_fitted_as_by_fit(
    init: str, implementation: str, images: list[sf.Signal], tmp_path: Path
) -> None:
    recipe, start = quick(target_psnr=24.0), init
    given = dict(GIVEN)
    if init in ("encoder", "heads", "meta"):
        del given["architecture"]
        training = sf.recipe("paper", pretrain_steps=10, pretrain_method="reptile" if init == "meta" else "strainer")
        start = sf.pretrain(images[:3], training, architecture=NETWORK)
        changes = {"encoder": {}, "heads": {"freeze": 2, "steps": 0}, "meta": {"start": "mean"}}[init]
        recipe = sf.recipe(recipe, **changes)
    dataset = fit_dataset(images, tmp_path / "out", start, recipe, implementation=implementation, **given)
    alone = sf.fit(
        images, start, recipe, implementation=implementation, architecture=None if init != start else NETWORK
    )
    assert len(dataset) == len(images)
    assert dataset.indices.tolist() == list(range(len(images)))
    same = torch.equal if implementation == "auto" else lambda a, b: torch.allclose(a, b, atol=1e-4)
    for i, row in enumerate(dataset.rows()):
        assert row.source == images[i].name
        assert row.signal.steps == alone.steps[i]
        assert row.signal.stop_reason == alone.stop_reasons[i]
        assert same(torch.nn.utils.parameters_to_vector(alone.module(i).parameters()), networks(dataset)[i])
    report = verify(dataset, images)
    assert report.passed and report.checked == report.same_bits == len(images)
    if init == "heads":
        assert all(torch.equal(networks(dataset)[0][:304], w[:304]) for w in networks(dataset))


def test_neither_order_nor_company_nor_threads_change_a_bit(images: list[sf.Signal], tmp_path: Path) -> None:
    recipe = quick(target_psnr=26.0)
    first = fit_dataset(images, tmp_path / "a", recipe=recipe, num_parallel=3, **GIVEN)
    order = [(7 * i + 3) % len(images) for i in range(len(images))]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        second = fit_dataset([images[i] for i in order], tmp_path / "b", recipe=recipe, **GIVEN)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(networks(first)[order], networks(second))
    assert [first.row(i).signal.psnr for i in order] == [row.signal.psnr for row in second.rows()]


def test_the_index_says_what_is_where(images: list[sf.Signal], tmp_path: Path) -> None:
    dataset = fit_dataset(images, tmp_path, recipe=quick(), **GIVEN)
    with (tmp_path / "index.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [int(line["index"]) for line in lines] == list(range(len(images)))
    assert len({line["shard"] for line in lines}) == 3  # eight a shard
    for line in lines:
        tensors, rows, architecture = files.read_shard(tmp_path / "shards" / f"{line['shard']}.safetensors")
        place = int(line["row"])
        assert architecture == NETWORK
        assert rows[place].index == int(line["index"])
        assert torch.equal(tensors["head.bias"][place], dataset.weights(int(line["index"]))["head.bias"])
        assert float(line["psnr"]) == pytest.approx(rows[place].signal.psnr, abs=1e-4)
        assert line["size"] == "8x8" and line["channels"] == "1" and line["stop_reason"] == "budget"
    assert not list(tmp_path.glob("shards/*.part"))
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(tmp_path / "index.parquet").to_pydict()
    assert {name: [str(v) for v in values] for name, values in table.items()}["shard"] == [r["shard"] for r in lines]
    assert table["fingerprint"] == [row.signal.fingerprint for row in dataset.rows()]
    assert table["index"] == list(range(len(images)))


def test_sizes_and_channels_may_be_mixed(
    images: list[sf.Signal], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_module, "WAITING_BYTES", 600)  # three signals of other sizes may wait
    folder = tmp_path / "in"
    folder.mkdir()
    sizes = [(8, 8), (6, 9), (8, 8), (5, 5)]
    for i, image in enumerate(images[:12]):
        pixels = Image.fromarray((image.values[..., 0].numpy() * 255).astype(np.uint8)).resize(sizes[i % 4][::-1])
        (pixels.convert("RGB") if i % 5 == 0 else pixels).save(folder / f"{i:02d}.png")
    (folder / "07b.png").write_bytes(b"not an image")
    seen: list[DatasetProgress] = []
    dataset = fit_dataset(folder, tmp_path / "out", recipe=quick(), on_progress=seen.append, **GIVEN)
    assert len(dataset) == 12
    assert dataset.indices.tolist() == [i for i in range(13) if i != 8]
    for i, row in enumerate(dataset.rows()):
        assert row.signal.shape == sizes[i % 4]
        assert dataset[i].head.out_features == row.signal.channels == (3 if i % 5 == 0 else 1)
    assert seen[-1].finished == 12 and seen[-1].skipped == 1 and seen[-1].number == 13
    assert "07b.png" in (tmp_path / "out" / "skipped.csv").read_text()
    assert verify(dataset).passed  # from where the folder lay
    with pytest.raises(sf.InputError, match="one number of channels"):
        dataset.flat_weights()
    assert dataset.flat_weights([1, 2]).shape[0] == 2


def test_memory_does_not_grow_with_the_number_of_signals(tmp_path: Path) -> None:
    alive: weakref.WeakSet[sf.Signal] = weakref.WeakSet()
    most = 0

    def endless() -> Iterator[sf.Signal]:
        nonlocal most
        for i in range(300):
            signal = sf.Signal(torch.rand(4, 4, 1, generator=torch.Generator().manual_seed(i)), f"s{i}")
            alive.add(signal)
            if i % 10 == 0:
                gc.collect()
            most = max(most, len(alive))
            yield signal

    dataset = fit_dataset(endless(), tmp_path, recipe=quick(steps=2), num_parallel=8, **GIVEN)
    assert len(dataset) == 300
    assert most <= 40


class Killed(BaseException):
    pass


def test_nothing_finished_is_lost_or_fitted_again(images: list[sf.Signal], tmp_path: Path) -> None:
    recipe, out = quick(target_psnr=26.0), tmp_path / "out"
    whole = fit_dataset(images, tmp_path / "whole", recipe=recipe, **GIVEN)

    def until(number: int) -> Iterator[sf.Signal]:
        for i, image in enumerate(images):
            if i == number:
                raise Killed
            yield image

    for number in (5, 11):  # in the middle of a shard, and of the second
        with pytest.raises(Killed):
            fit_dataset(until(number), out, recipe=recipe, num_parallel=2, resume=True, **GIVEN)
    kept = rows_on_disk(out)
    assert len(kept) >= 8
    seen: list[DatasetProgress] = []
    # Iterators have no length to compare.
    done = fit_dataset(iter(images), out, recipe=recipe, resume=True, on_progress=seen.append, **GIVEN)
    assert seen[-1].fitted == len(images) - len(kept)
    assert torch.equal(networks(done), networks(whole))
    again = fit_dataset(iter(images), out, recipe=recipe, resume=True, on_progress=seen.append, **GIVEN)
    assert seen[-1].fitted == 0 and len(again) == len(images)


CHILD = """
import sys, numpy as np, torch
import strainer_fast as sf
torch.set_num_threads(1)
out, shard = sys.argv[1], (int(sys.argv[2]), int(sys.argv[3]))
images = np.random.default_rng(0).integers(0, 256, (400, 8, 8), dtype=np.uint8)
sf.fit_dataset(images, out, recipe=sf.recipe("small", steps=60), architecture=sf.Architecture(16, 3, 2),
               resume=True, shard=shard, shard_rows=30, num_parallel=4)
"""


def child(out: Path, index: int = 0, parts: int = 1, **more: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CHILD, str(out), str(index), str(parts)], **more)  # type: ignore[call-overload]


def rows_on_disk(out: Path) -> list[int]:
    """Indices of all networks that are safe."""
    found = [row.index for path in files.shard_paths(out) for row in files.read_rows(path)]
    for path in out.glob("shards/*.part"):
        if path.with_suffix(".safetensors").exists():
            continue  # killed between the two: the shard counts
        with contextlib.suppress(FileNotFoundError):  # it becomes a shard meanwhile
            found += [row.index for row, _, _ in records(path.read_bytes())]
    return found


def test_kill_9_at_any_moment(tmp_path: Path) -> None:
    out = tmp_path / "out"
    generator = np.random.default_rng(1)
    safe: set[int] = set()
    for _ in range(3):
        process = child(out)
        deadline = time.monotonic() + 60
        wanted = len(safe) + int(generator.integers(10, 60))
        while process.poll() is None and time.monotonic() < deadline and len(rows_on_disk(out)) < wanted:
            time.sleep(0.01)
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = rows_on_disk(out)
        assert len(now) == len(set(now)), "fitted twice"
        assert safe <= set(now), "lost"
        safe = set(now)
    assert child(out).wait() == 0
    dataset = FittedDataset(out)
    assert dataset.indices.tolist() == list(range(400))
    assert not list(out.glob("shards/*.part"))
    images = np.random.default_rng(0).integers(0, 256, (400, 8, 8), dtype=np.uint8)
    assert verify(dataset, images).passed


def test_several_processes_fill_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = [child(out, i, 3) for i in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    dataset = FittedDataset(out)
    assert dataset.indices.tolist() == list(range(400))
    with (out / "index.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 400
    # One more process goes on with what three have left.
    for path in files.shard_paths(out)[::2]:
        path.unlink()
    assert child(out).wait() == 0
    assert FittedDataset(out).indices.tolist() == list(range(400))


def test_a_torn_record_is_dropped(images: list[sf.Signal], tmp_path: Path) -> None:
    dataset = fit_dataset(images[:4], tmp_path / "a", recipe=quick(steps=1), **GIVEN)
    weights = {name: torch.stack([dataset.weights(i)[name] for i in range(4)]) for name in dataset.weights(0)}
    journal = Journal(tmp_path / "j.part")
    journal.append([dataset.row(i) for i in range(4)], weights)
    journal.close(delete=False)
    data = (tmp_path / "j.part").read_bytes()
    ends = [0, *(end for _, _, end in records(data))]
    assert len(ends) == 5 and ends[-1] == len(data)
    for length in (0, 3, ends[1] - 1, ends[1], ends[2] + 9, len(data) - 1):
        (tmp_path / "j.part").write_bytes(data[:length])
        whole = sum(end <= length for end in ends) - 1
        journal = Journal(tmp_path / "j.part")
        assert len(journal.rows) == whole
        journal.append([dataset.row(3)], {name: w[3:] for name, w in weights.items()})
        journal.close(delete=False)
        found = list(records((tmp_path / "j.part").read_bytes()))
        assert [row.index for row, _, _ in found] == [*range(whole), 3]
        assert torch.equal(found[-1][1], dataset.flat_weights([3]))
    flipped = bytearray(data)
    flipped[ends[1] + 60] ^= 1
    assert len(list(records(bytes(flipped)))) == 1


def test_killed_between_a_shard_and_its_journal(images: list[sf.Signal], tmp_path: Path) -> None:
    dataset = fit_dataset(images[:4], tmp_path, recipe=quick(steps=1), **GIVEN)
    journal = Journal(tmp_path / "shards" / "00000.part")
    journal.append([dataset.row(3)], {name: w[None] for name, w in dataset.weights(3).items()})
    journal.close(delete=False)
    seen: list[DatasetProgress] = []
    again = fit_dataset(images[:4], tmp_path, recipe=quick(steps=1), resume=True, on_progress=seen.append, **GIVEN)
    assert seen[-1].fitted == 0
    assert again.indices.tolist() == [0, 1, 2, 3]
    assert not journal.path.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    limited = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (15000, 15000))\n"
    found = subprocess.run(
        [sys.executable, "-c", limited + CHILD, str(out), "0", "1"], capture_output=True, text=True, check=False
    )
    assert found.returncode != 0
    assert os.strerror(errno.EFBIG) in found.stderr
    kept = rows_on_disk(out)
    assert 1 <= len(kept) < 30
    assert child(out).wait() == 0
    assert FittedDataset(out).indices.tolist() == list(range(400))


def test_ctrl_c_keeps_what_is_finished(images: list[sf.Signal], tmp_path: Path) -> None:
    recipe = quick(steps=400, target_psnr=None)

    pressed = False

    def press(progress: DatasetProgress) -> None:
        nonlocal pressed
        if progress.fitted >= 4 and not pressed:
            pressed = True
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    fit_module.CALLBACK_SECONDS, before = 0.0, fit_module.CALLBACK_SECONDS
    try:
        with pytest.raises(sf.Interrupted, match="Resume to go on") as caught:
            fit_dataset(images, tmp_path, recipe=recipe, num_parallel=2, on_progress=press, **GIVEN)
    finally:
        fit_module.CALLBACK_SECONDS = before
    kept = caught.value.result
    assert 4 <= len(kept) < len(images)
    assert {row.signal.stop_reason for row in kept.rows()} == {"budget"}
    done = fit_dataset(images, tmp_path, recipe=recipe, resume=True, **GIVEN)
    assert len(done) == len(images)


def test_what_does_not_belong_together_is_refused(images: list[sf.Signal], tmp_path: Path) -> None:
    recipe = quick()
    out = tmp_path / "out"
    fit_dataset(images[:6], out, recipe=recipe, **GIVEN)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def refused(match: str, signals: object = images[:6], **changes: object) -> None:
        with pytest.raises(sf.InputError, match=match):
            fit_dataset(signals, out, **{"recipe": recipe, "resume": True} | GIVEN | changes)  # type: ignore[arg-type]

    refused("a new or empty folder", resume=False)
    refused(r"recipe\.steps 12 -> 13", recipe=quick(steps=13))
    refused("init siren -> shared", init="shared")
    refused(r"architecture\.hidden_features 16 -> 8", architecture=sf.Architecture(8, 3, 2))
    refused(r"source\.number 6 -> 7", images[:7])
    refused(r"signal 2 \(.*\): expected the values that it was fitted to", [*images[:2], images[9], *images[3:6]])
    refused(r"source\.reading\.size None -> \[4, 4\]", size=4)
    refused("num_parallel", num_parallel=0)
    refused("shard", shard=(2, 2))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    replaced = fit_dataset(images[:3], out, recipe=quick(steps=1), overwrite=True, **GIVEN)
    assert len(replaced) == 3 and len(list(out.glob("shards/*"))) == 1


def test_unusable_signals_leave_no_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"no")
    with pytest.raises(sf.InputError, match=r"at least one that can be read, got .*a\.png: not an image"):
        fit_dataset(tmp_path / "in", tmp_path / "out")
    with pytest.raises(sf.InputError, match="none about reading beside a Stream"):
        fit_dataset(sf.signals.stream(np.zeros((2, 4, 4), np.uint8)), tmp_path / "out", size=2)
    assert not (tmp_path / "out").exists()


def test_two_runs_do_not_share_a_folder(images: list[sf.Signal], tmp_path: Path) -> None:
    fit_dataset(images[:2], tmp_path, recipe=quick(steps=1), **GIVEN)
    settings = files.read_manifest(tmp_path)
    options = {"resume": True, "overwrite": False, "shard_rows": None, "needed_bytes": 0}
    with open_writer(tmp_path, settings, NETWORK, (0, 1), **options):
        for part in ((0, 1), (1, 2)):  # the same part, or another partition
            with (
                pytest.raises(sf.InputError, match="no other run"),
                open_writer(tmp_path, settings, NETWORK, part, **options),
            ):
                pass
    with open_writer(tmp_path, settings, NETWORK, (0, 1), **options):
        pass


def test_networks_are_read_one_by_one_or_as_a_torch_dataset(images: list[sf.Signal], tmp_path: Path) -> None:
    dataset = fit_dataset(images[:10], tmp_path, recipe=quick(), **GIVEN)
    network = dataset[-1]
    assert isinstance(network, sf.Siren)
    vector = torch.nn.utils.parameters_to_vector(network.parameters())
    assert torch.equal(vector, dataset.flat_weights([9])[0])
    with pytest.raises(IndexError):
        dataset[10]
    assert sum(1 for _ in itertools.islice(dataset, 20)) == 10  # type: ignore[call-overload]
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=4,
        collate_fn=lambda sirens: torch.stack([s.head.bias.detach() for s in sirens]),
        num_workers=1,
    )
    biases = torch.cat(list(loader))
    assert torch.equal(biases, torch.stack([dataset.weights(i)["head.bias"] for i in range(10)]))
    mse = sf.reference.mse(network(images[9].points()).detach(), images[9].samples())
    assert float(sf.reference.psnr(mse)) == pytest.approx(dataset.row(9).signal.psnr, abs=1e-3)


def test_verify_finds_what_is_not_so(images: list[sf.Signal], tmp_path: Path) -> None:
    dataset = fit_dataset(images[:8], tmp_path, recipe=quick(), **GIVEN)
    path = files.shard_paths(tmp_path)[0]
    tensors, rows, architecture = files.read_shard(path)
    tensors["head.bias"][2] += 0.1
    files.write_shard(path, architecture, rows, tensors)
    found = verify(FittedDataset(tmp_path), images[:8])
    assert not found.passed and [name for name, _, _ in found.wrong] == [images[2].name]
    assert found.checked == 8 and found.same_bits == 7
    other = [*images[:5], images[6], *images[6:7]]
    found = verify(dataset, other)
    assert found.changed == [images[6].name] and found.missing == [7]
    with pytest.raises(sf.InputError, match="Pass them"):
        verify(dataset)


@pytest.mark.parametrize("damage", ["cut", "kind", "rows", "manifest", "no manifest"])
def test_damaged_folders_are_named(damage: str, images: list[sf.Signal], tmp_path: Path) -> None:
    fit_dataset(images[:2], tmp_path, recipe=quick(steps=1), **GIVEN)
    path = files.shard_paths(tmp_path)[0]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "kind":
        sf.pretrain(images[:1], sf.recipe("paper", pretrain_steps=1), architecture=NETWORK).save(path)
    elif damage == "rows":
        tensors, rows, architecture = files.read_shard(path)
        files.write_shard(path, architecture, rows[:1], tensors)
    elif damage == "manifest":
        (tmp_path / "dataset.json").write_text("{}")
    else:
        (tmp_path / "dataset.json").unlink()
    with pytest.raises(sf.InputError):
        FittedDataset(tmp_path).flat_weights()


def test_exports_hold_the_same_networks(images: list[sf.Signal], tmp_path: Path) -> None:
    dataset = fit_dataset(images[:10], tmp_path / "out", recipe=quick(), **GIVEN)
    flat = networks(dataset)
    sf.datasets.export(dataset, tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as arrays:
        assert np.array_equal(arrays["weights"], flat.numpy())
        assert arrays["names"].tolist() == [name for name, _ in dataset[0].named_parameters()]
        assert arrays["source"][3] == images[3].name and arrays["index"].tolist() == list(range(10))
        assert arrays["psnr"][3] == dataset.row(3).signal.psnr
    sf.datasets.export(dataset, tmp_path / "each")
    paths = sorted((tmp_path / "each").iterdir())
    assert len(paths) == 10 and images[3].name in paths[3].name
    state = torch.load(paths[3], weights_only=True)
    siren = sf.Siren(2, 16, 3, 1)
    siren.load_state_dict(state)
    assert torch.equal(torch.nn.utils.parameters_to_vector(siren.parameters()), flat[3])
    with pytest.raises(sf.InputError, match="ending"):
        sf.datasets.export(dataset, tmp_path / "all.txt")


def test_the_export_for_fit_a_nef_computes_the_same_values(images: list[sf.Signal], tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    import json

    dataset = fit_dataset(images[:3], tmp_path / "out", recipe=quick(), **GIVEN)
    sf.datasets.export(dataset, tmp_path / "all.hdf5")
    with h5py.File(tmp_path / "all.hdf5") as file:
        config = json.loads(file["param_config"][0].decode())
        params = file["params"][1]
    at, layers = 0, {}
    for name, shape in config:
        size = int(np.prod(shape))
        layers[name] = params[at : at + size].reshape(shape)
        at += size
    assert at == len(params)
    assert [name for name, _ in config][:2] == ["kernel_net_0.linear.bias", "kernel_net_0.linear.kernel"]
    x = images[1].points().numpy()
    for i in range(2):
        x = np.sin(30.0 * (x @ layers[f"kernel_net_{i}.linear.kernel"] + layers[f"kernel_net_{i}.linear.bias"]))
    x = x @ layers["output_linear.kernel"] + layers["output_linear.bias"]
    np.testing.assert_allclose(x, dataset[1](images[1].points()).detach().numpy(), atol=1e-4)
