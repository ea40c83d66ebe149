"""From images, folders, arrays and tensors to values in [0, 1] and coordinates in [-1, 1]."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import strainer_fast as sf
from strainer_fast.signals import Signal, grid, load, load_all, samples, unique_names

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 4), dtype=np.uint8)
RGB = RNG.integers(0, 256, (6, 4, 3), dtype=np.uint8)
RGBA = RNG.integers(0, 256, (6, 4, 4), dtype=np.uint8)


def test_grid_convention() -> None:
    expected = [[-1, -1], [-1, 0], [-1, 1], [1, -1], [1, 0], [1, 1]]
    assert grid((2, 3)).tolist() == expected
    assert grid((1, 2)).tolist() == [[0, -1], [0, 1]]
    assert grid((1,)).tolist() == [[0]]
    assert grid((2, 1), [(0, 1), (-1, 0)]).tolist() == [[0, -0.5], [1, -0.5]]
    assert grid((4, 5, 6)).shape == (120, 3)


def test_points_and_samples_agree() -> None:
    signal = load(GREY)[0]
    points, values = signal.points(), signal.samples()
    assert points.shape == (24, 2)
    assert values[1 * 4 + 3, 0] == GREY[1, 3] / np.float32(255)
    torch.testing.assert_close(points[1 * 4 + 3], torch.tensor([-1 + 2 * 1 / 5, 1.0]))


@pytest.mark.parametrize(
    ("array", "expected", "value_range"),
    [
        (GREY, GREY[..., None] / 255, (0, 255)),
        (RGB, RGB / 255, (0, 255)),
        (GREY.astype(np.uint16) * 257, GREY[..., None] / 255, (0, 65535)),
        (GREY > 128, (GREY > 128)[..., None] * 1.0, (0, 1)),
        (GREY / 255, GREY[..., None] / 255, (0, 1)),
        ((GREY / 255).astype(np.float16), (GREY / 255).astype(np.float16)[..., None], (0, 1)),
    ],
    ids=["uint8", "rgb", "uint16", "bool", "float64", "float16"],
)
def test_arrays_and_tensors(array: np.ndarray, expected: np.ndarray, value_range: tuple[float, float]) -> None:
    for source in (array, torch.from_numpy(array)):
        (signal,) = load(source)
        np.testing.assert_allclose(signal.values.numpy(), expected, atol=1e-7)
        assert signal.value_range == value_range
        assert signal.values.dtype == torch.float32


def test_value_range_scales() -> None:
    (signal,) = load(np.array([[-1000, 0, 3000]], dtype=np.int16), value_range=(-1000, 3000))
    assert signal.values.flatten().tolist() == [0.0, 0.25, 1.0]
    assert signal.value_range == (-1000.0, 3000.0)


def test_bfloat16_and_gradient_tensors() -> None:
    assert load(torch.full((2, 2), 0.5, dtype=torch.bfloat16))[0].values.unique().tolist() == [0.5]
    assert not load(torch.full((2, 2), 0.5, requires_grad=True))[0].values.requires_grad


def test_stacks_and_sequences() -> None:
    assert len(load(np.stack([RGB, RGB]))) == 2
    signals = load([GREY, torch.from_numpy(RGB), Image.fromarray(GREY), Signal(torch.rand(3, 3, 1), "own")])
    assert [s.name for s in signals] == ["signal-0", "signal-1", "signal-2", "own"]
    assert [s.channels for s in signals] == [1, 3, 1, 1]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "I;16", "F", "LA", "RGBA", "PA"])
def test_pillow_modes(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(GREY.astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray((GREY / 255).astype(np.float32))
    elif mode == "PA":
        image = Image.fromarray(RGBA).convert("RGB").convert("P").convert("PA")
    else:
        image = Image.fromarray(RGBA).convert("RGB").convert(mode)
    (signal,) = load(image, alpha="drop")
    assert signal.channels == (1 if mode in ("1", "L", "I;16", "F", "LA") else 3)
    if mode in ("I;16", "F"):
        np.testing.assert_allclose(signal.values[..., 0], GREY / 255, atol=1e-7)
    if mode == "RGB":
        np.testing.assert_allclose(signal.values, RGBA[..., :3] / 255, atol=1e-7)


def test_sixteen_bit_png_keeps_its_precision(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 65536, (5, 7)).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    (signal,) = load(tmp_path / "deep.png")
    np.testing.assert_allclose(signal.values[..., 0], pixels / 65535, atol=1e-7)
    assert signal.value_range == (0, 65535)


def test_sixteen_bit_colour_png_says_what_is_lost(tmp_path: Path) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + struct.pack(">6H", *([65535, 0, 32768] * 2)) for _ in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(data)
    with pytest.warns(UserWarning, match="16-bit colour read at 8 bits"):
        (signal,) = load(tmp_path / "deep.png")
    assert signal.channels == 3


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    Image.fromarray(RGB).save(tmp_path / "turned.png", exif=exif)
    (signal,) = load(tmp_path / "turned.png")
    assert signal.shape == (4, 6)
    np.testing.assert_allclose(signal.values, np.rot90(RGB, -1) / 255, atol=1e-7)


def test_alpha_needs_a_choice() -> None:
    with pytest.raises(sf.InputError, match=r"a choice for its alpha channel.*'drop', 'black' or 'white'"):
        load(RGBA)
    with pytest.raises(sf.InputError, match="alpha"):
        load(Image.fromarray(RGBA))
    colour, opacity = RGBA[..., :3] / 255, RGBA[..., 3:] / 255
    for choice, expected in {
        "drop": colour,
        "black": colour * opacity,
        "white": colour * opacity + 1 - opacity,
        "keep": RGBA / 255,
    }.items():
        for source in (RGBA, Image.fromarray(RGBA)):
            np.testing.assert_allclose(load(source, alpha=choice)[0].values, expected, atol=1e-6)
    with pytest.raises(sf.InputError, match="alpha: expected one of 'drop'"):
        load(RGB, alpha="pink")


def test_transparent_palette_counts_as_alpha() -> None:
    image = Image.fromarray(RGB).convert("P")
    image.info["transparency"] = 0
    with pytest.raises(sf.InputError, match="alpha"):
        load(image)
    assert load(image, alpha="white")[0].channels == 3


def test_channels() -> None:
    grey = load(RGB, channels=1)[0]
    np.testing.assert_allclose(grey.values[..., 0], RGB / 255 @ [0.299, 0.587, 0.114], atol=1e-6)
    repeated = load(GREY, channels=3)[0]
    np.testing.assert_allclose(repeated.values, np.repeat(GREY[..., None], 3, -1) / 255, atol=1e-7)
    with pytest.raises(sf.InputError, match="channels: expected 1"):
        load(RGB, channels=2)


def test_size_and_crop() -> None:
    assert load(RGB, size=8)[0].shape == (8, 8)
    assert load(RGB, size=(3, 5))[0].shape == (3, 5)
    assert load(RGB, crop=True)[0].shape == (4, 4)
    np.testing.assert_allclose(load(RGB, crop=True)[0].values, RGB[1:5] / 255, atol=1e-7)
    # A crop to the aspect ratio and a resize: a disc stays a disc.
    y, x = np.mgrid[:40, :80]
    disc = ((y - 19.5) ** 2 + (x - 39.5) ** 2 < 15**2).astype(np.float32)
    (signal,) = load(disc, size=20, crop=True)
    small = signal.values[..., 0] > 0.5
    assert 14 <= small.any(0).sum() == small.any(1).sum() <= 16
    assert 0 <= signal.values.min() <= signal.values.max() <= 1
    assert load(RGB)[0].shape == (6, 4)


@pytest.mark.parametrize("size", [0, -3, 100_000, (5, 0), (4.0, 4)])
def test_absurd_sizes(size: object) -> None:
    with pytest.raises(sf.InputError, match="1 to 16384 pixels a side"):
        load(RGB, size=size)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
def test_thin_images(shape: tuple[int, int]) -> None:
    (signal,) = load(np.full(shape, 0.5))
    assert signal.points().shape == (shape[0] * shape[1], 2)
    assert (signal.points()[:, 0] == 0).all() == (shape[0] == 1)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[0.5, math.nan]]), r"finite numbers, got 1 NaN or infinite, the first at \(0, 1, 0\)"),
        (np.array([[math.inf]]), "finite numbers"),
        (np.array([[1.5, 0.0]]), r"numbers in \[0, 1\], got \[0, 1.5\].*value_range"),
        (np.array([[-0.1]]), r"numbers in \[0, 1\]"),
        (np.zeros((2, 2), np.int32), "value_range"),
        (np.zeros((2, 2), complex), "value_range|numbers"),
        (np.zeros((0, 3)), "not empty"),
        (np.zeros(5), r"an array \[H, W\]"),
        (np.zeros((3, 8, 8)), "Channels come last"),
        (np.zeros((10, 28, 28)), r"\[N, H, W, 1\]"),
    ],
)
def test_unusable_arrays(array: np.ndarray, message: str) -> None:
    with pytest.raises(sf.InputError, match=message):
        load(array)


@pytest.mark.parametrize("value", [math.nan, 2.0])
def test_resizing_does_not_hide_bad_values(value: float) -> None:
    array = np.zeros((8, 8))
    array[3, 3] = value
    with pytest.raises(sf.InputError):
        load(array, size=4)


def test_folder_with_bad_files(image_folder: Path) -> None:
    (image_folder / "notes.txt").write_text("hello")
    whole = (image_folder / "a.png").read_bytes()
    (image_folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (image_folder / "empty.png").touch()
    (image_folder / ".hidden").write_text("ignored")
    (image_folder / "sub").mkdir()
    signals, skipped = load_all(image_folder)
    assert [s.name for s in signals] == ["a", "b", "c"]
    assert [Path(s.source).name for s in skipped] == ["cut.png", "empty.png", "notes.txt"]
    assert skipped[2].reason == "not an image that Pillow can read"
    with pytest.warns(UserWarning, match=r"skipped 3 of 6: .*cut\.png"):
        load(image_folder)


def test_nothing_readable(tmp_path: Path) -> None:
    with pytest.raises(sf.InputError, match="nothing there"):
        load(tmp_path / "missing")
    with pytest.raises(sf.InputError, match="no files in it"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(sf.InputError, match=r"notes.txt: not an image"):
        load(tmp_path)
    with pytest.raises(sf.InputError, match="empty sequence"):
        load([])
    with pytest.raises(sf.InputTypeError, match="a path, array, tensor"):
        load(3)


def test_decompression_bomb_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with pytest.raises(sf.InputError, match="at most 3,000 pixels"):
        load(tmp_path / "bomb.png")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
@pytest.mark.parametrize("seed", range(8))
def test_damaged_files_never_crash(seed: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, format=["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO"][seed])
    data = bytearray(buffer.getvalue())
    for _ in range(40):
        broken = bytearray(data)
        for position in generator.integers(8, len(data), 4):
            broken[position] = generator.integers(256)
        (tmp_path / "x").write_bytes(broken[: generator.integers(8, len(data) + 1)])
        signals, skipped = load_all(tmp_path / "x", alpha="drop")
        assert len(signals) + len(skipped) == 1


def test_samples() -> None:
    train, test = samples("brain-mri"), samples("brain-mri", "test")
    assert len(train) == len(test) == 10
    assert {s.values.shape for s in train + test} == {(178, 178, 1)}
    assert not {s.fingerprint() for s in train} & {s.fingerprint() for s in test}
    photos = samples("photos", "all", size=32)
    assert len(photos) == 20
    assert {s.values.shape for s in photos} == {(32, 32, 3)}
    with pytest.raises(sf.InputError, match="samples: expected one of 'brain-mri', 'photos'"):
        samples("cats")
    assert "CC0-1.0" in (Path(sf.signals.__file__).parent / "data" / "NOTICE").read_text()


def test_unique_names() -> None:
    names = unique_names(["a", "a", "A", "../../etc/passwd", "", "..", "=cmd()", "héllo wörld", "x" * 500, "a-2"])
    assert len({n.lower() for n in names}) == len(names)
    assert all("/" not in n and not n.startswith((".", "-", "=")) and 0 < len(n) <= 125 for n in names)
    assert names[:3] == ["a", "a-2", "A-3"]
    assert "héllo wörld" in names


def test_same_name_from_two_folders(tmp_path: Path) -> None:
    for sub in ("one", "two"):
        (tmp_path / sub).mkdir()
        Image.fromarray(GREY).save(tmp_path / sub / "x.png")
    assert [s.name for s in load([tmp_path / "one", tmp_path / "two"])] == ["x", "x-2"]


def test_signals_of_other_dimensions() -> None:
    volume = Signal(torch.rand(3, 4, 5, 1))
    assert volume.points().shape == (60, 3)
    sound = Signal(torch.rand(50, 2))
    assert sound.shape == (50,)
    with pytest.raises(sf.InputTypeError, match=r"signals.load"):
        Signal(np.zeros((2, 2, 1)))


def test_names_are_short_enough_for_file_systems() -> None:
    names = unique_names(["脑" * 83, "脑" * 84, "é" * 300])
    assert len(set(names)) == 3
    assert all(len(n.encode()) <= 125 for n in names)


def test_broken_links_are_named(image_folder: Path) -> None:
    (image_folder / "z.png").symlink_to(image_folder / "gone.png")
    signals, skipped = load_all(image_folder)
    assert len(signals) == 3
    assert [Path(s.source).name for s in skipped] == ["z.png"]


def test_sixteen_bit_colour_tiff_says_what_is_lost(tmp_path: Path) -> None:
    import struct

    # A 2x1 RGB TIFF of 16 bits a sample, uncompressed; Pillow reads such files but cannot write them.
    pixels = struct.pack("<6H", 65535, 0, 32768, 0, 65535, 0)
    bits = struct.pack("<3H", 16, 16, 16)
    tags = [(256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 14)]
    tags += [(277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 1, len(pixels))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *t) for t in tags) + bytes(4)
    header = b"II*\0" + struct.pack("<I", 8 + len(bits) + len(pixels))
    (tmp_path / "deep.tiff").write_bytes(header + bits + pixels + directory)
    with pytest.warns(UserWarning, match="16-bit colour read at 8 bits"):
        (signal,) = load(tmp_path / "deep.tiff")
    assert signal.shape == (1, 2)
    np.testing.assert_allclose(signal.values[0, 0], [1.0, 0.0, 0.5], atol=0.01)


def test_sixteen_bit_colour_ppm_says_what_is_lost(tmp_path: Path) -> None:
    (tmp_path / "deep.ppm").write_bytes(b"P6 2 1 65535\n" + bytes(range(12)))
    (tmp_path / "plain.ppm").write_bytes(b"P6 2 1 255\n" + bytes(range(6)))
    with pytest.warns(UserWarning, match="deep.ppm: 16-bit colour read at 8 bits"):
        load(tmp_path / "deep.ppm")
    assert load(tmp_path / "plain.ppm")[0].channels == 3
