"""Grids into files: what is written is what `render` gives, and memory does not grow with the grid."""

import io
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import strainer_fast as sf
from strainer_fast._png import write_png
from strainer_fast.fitting import rendering, result


@pytest.fixture
def network() -> sf.Siren:
    torch.manual_seed(0)
    return sf.Siren(2, 16, 3, 3)


def decoded(data: bytes) -> NDArray[np.unsignedinteger]:
    """[height, width, channels]; by the specification, for Pillow reduces 16-bit colour to 8 bits."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    position, packed = 8, b""
    while position < len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        body = data[position + 8 : position + 8 + length]
        assert zlib.crc32(kind + body) == struct.unpack(">I", data[position + 8 + length :][:4])[0]
        if kind == b"IHDR":
            width, height, bits, colour, *rest = struct.unpack(">IIBBBBB", body)
            assert rest == [0, 0, 0]
        packed += body if kind == b"IDAT" else b""
        position += 12 + length
    assert kind == b"IEND"
    rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, -1)
    assert (rows[:, 0] == 2).all()
    values = np.cumsum(rows[:, 1:], axis=0, dtype=np.uint8).view(">u2" if bits == 16 else np.uint8)
    return values.reshape(height, width, {0: 1, 4: 2, 2: 3, 6: 4}[colour])


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_in_strips(bits: int, channels: int) -> None:
    kind = np.uint8 if bits == 8 else np.uint16
    image = np.random.default_rng(0).integers(0, 2**bits, (13, 7, channels)).astype(kind)
    file = io.BytesIO()
    write_png(file, [image[:5], image[5:6], image[6:]], 13, 7, channels, bits)
    np.testing.assert_array_equal(decoded(file.getvalue()), image)
    if bits == 8 or channels == 1:
        np.testing.assert_array_equal(np.array(Image.open(file)).reshape(image.shape), image)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_png_is_the_rendered_image(
    network: sf.Siren, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    monkeypatch.setattr(rendering, "CHUNK", 100)  # several strips, the last one shorter
    window = [(-0.5, 0.25), (0, 1)]
    path = sf.render_to(network, tmp_path / "a.png", (23, 40), window, bits=bits)
    expected = sf.render(network, (23, 40), window).clamp(0, 1).double()
    off = decoded(path.read_bytes()) - expected.numpy() * (2**bits - 1)
    assert np.abs(off).max() <= 0.5 + 1e-2


def test_an_array_has_the_values_as_they_are(network: sf.Siren, tmp_path: Path) -> None:
    written = np.load(sf.render_to(network, str(tmp_path / "a.npy"), (9, 300)))
    assert written.dtype == np.float32
    np.testing.assert_array_equal(written, sf.render(network, (9, 300)).numpy())
    volume = sf.Siren(3, 8, 2, 5)
    assert np.load(sf.render_to(volume, tmp_path / "v.npy", 4)).shape == (4, 4, 4, 5)


@pytest.mark.parametrize(
    ("channels", "axes", "name", "bits", "message"),
    [
        (3, 2, "a.jpg", 8, "ends in .png or .npy"),
        (5, 2, "a.png", 8, "1 to 4 channels"),
        (1, 3, "a.png", 8, "2 axes"),
        (1, 2, "a.png", 12, "8 or 16"),
    ],
)
def test_what_cannot_be_written_is_said_before_any_work(
    channels: int, axes: int, name: str, bits: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(sf.InputError, match=message):
        sf.render_to(sf.Siren(axes, 8, 2, channels), tmp_path / name, 4, bits=bits)
    assert not list(tmp_path.iterdir())


def test_a_size_beyond_reason_is_refused(network: sf.Siren, tmp_path: Path) -> None:
    with pytest.raises(sf.InputError, match="size"):
        sf.render_to(network, tmp_path / "a.png", 2**21)
    with pytest.raises(sf.InputError, match="bytes free"):
        sf.render_to(network, tmp_path / "a.npy", 2**20)


def test_memory_does_not_grow_with_the_grid(network: sf.Siren, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all tensors, by counting what PyTorch is asked for: none is larger than a strip needs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.most = max(self.most, out.numel())
            return out

    monkeypatch.setattr(rendering, "CHUNK", 2**12)
    most = []
    for size in (128, 512):
        with Largest() as seen:
            sf.render_to(network, tmp_path / "a.png", size)
        most.append(seen.most)
    assert most[0] == most[1] <= 2**12 * 16


def test_a_precision_that_only_a_gpu_has_is_refused_before_any_work(network: sf.Siren, tmp_path: Path) -> None:
    for call in (
        lambda: sf.render(network, 8, precision="fp16"),
        lambda: sf.render_to(network, tmp_path / "x.png", 8, precision="fp16"),
    ):
        with pytest.raises(sf.InputError, match="precision: expected 'fp32' with implementation"):
            call()
    with pytest.raises(sf.InputError, match="precision: expected one of"):
        sf.render(network, 8, precision="half")
    assert not list(tmp_path.iterdir())


def test_a_signal_that_came_back_exactly_is_drawn_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing else is asked for: in the precision in which its values were found right."""
    image = torch.rand(5, 6, 3)
    fitted = sf.fit([image, image.flip(0)], "siren", sf.recipe("paper", steps=1), device="cpu")
    signals = [
        replace(signal, stop_reason=reason) for signal, reason in zip(fitted.signals, ("exact", "budget"), strict=True)
    ]
    fitted, asked = replace(fitted, signals=tuple(signals)), []

    def record(*arguments: object, precision: str, **_: object) -> None:
        asked.append(precision)

    for name in ("render", "render_to"):
        monkeypatch.setattr(result, name, record)
    fitted.render()
    fitted.render(precision="fp16")
    fitted.render_to(tmp_path / "a.png", 0)
    fitted.render_to(tmp_path / "b.png", 1)
    assert asked == ["fp32", "auto", "fp16", "fp16", "fp32", "auto"]
