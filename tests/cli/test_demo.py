"""The demo at a fraction of its size: same code, same files."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import strainer_fast as sf
from strainer_fast import demo
from strainer_fast.cli import app


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SIZE", 20)
    monkeypatch.setattr(demo, "PRETRAIN_STEPS", 60)
    monkeypatch.setattr(demo, "FAST_PRETRAIN_STEPS", 60)
    monkeypatch.setattr(demo, "STEPS", 12)
    monkeypatch.setattr(demo, "TABLE_STEPS", (0, 5, 12))
    monkeypatch.setattr(demo, "PICTURE_STEPS", (2, 5, 8, 12))
    monkeypatch.setattr(demo, "TARGETS", (8, 12, 90))


@pytest.mark.usefixtures("_short")
def test_demo(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    for line in ("PSNR dB at step", "seconds to reach", "fast "):
        assert line in done.output
    assert "not reached" in done.output
    numbers = json.loads((tmp_path / "demo.json").read_text())
    assert set(numbers["psnr"]) == set(demo.METHODS)
    shown = next(line for line in done.output.splitlines() if line.startswith("SIREN")).split()
    assert shown[1:] == [f"{numbers['psnr']['SIREN'][k]:.1f}" for k in ("0", "5", "12")]
    assert numbers["psnr"]["fast"]["12"] > numbers["psnr"]["STRAINER"]["12"] + 3
    with Image.open(tmp_path / "strainer.png") as picture:
        assert picture.width > 1000
    assert sf.Encoder.load(tmp_path / "encoder.safetensors").record["steps"] == 60


def test_demo_without_matplotlib_fails_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "strainer-fast[plots]" in done.stderr
