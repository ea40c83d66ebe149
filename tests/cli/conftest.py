"""What the command line's tests share."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import strainer_fast as sf
from strainer_fast.cli import app


@pytest.fixture
def run() -> Callable[..., Any]:
    """run(verb, arguments ...) -> result with exit_code, output, stdout, stderr"""

    def call(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return call


@pytest.fixture
def rows() -> Callable[[Path], list[dict[str, str]]]:
    """Rows of a CSV file."""

    def read(path: Path) -> list[dict[str, str]]:
        with path.open() as file:
            return list(csv.DictReader(file))

    return read


@pytest.fixture
def encoder_file(encoder: sf.Encoder, tmp_path: Path) -> Path:
    """A trained encoder on disk."""
    path = tmp_path / "trained.safetensors"
    encoder.save(path)
    return path
