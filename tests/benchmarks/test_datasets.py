"""Fits per second: every provider fits the same signals to the same PSNR, and one that does not gets no speed."""

from pathlib import Path

import numpy as np
import pytest

import strainer_fast as sf
from strainer_fast.benchmarks.datasets import __main__ as bench
from strainer_fast.benchmarks.datasets import providers
from strainer_fast.benchmarks.datasets.cases import Case, Images
from strainer_fast.benchmarks.harness import ParityError
from strainer_fast.benchmarks.time_to_psnr.__main__ import read_rows


def _scans() -> Images:
    return np.stack([s.values.numpy() for s in sf.signals.samples("brain-mri", size=12)]).astype(np.float32)


CASE = Case("scans", _scans, sf.Architecture(16, 3, 2), (3,), 10, 4e-3)
TORCH = {name: build for name, build in bench.PROVIDERS.items() if name != "JAX vmap"}


@pytest.mark.parametrize("target", [None, 15.0])
def test_providers_reach_the_same(target: float | None) -> None:
    found = {name: build(CASE, target)(_scans()[:3]) for name, build in TORCH.items()}
    bench._gate(found, target)
    for psnr, steps in found.values():
        assert len(psnr) == 3
        assert steps == 10 if target is None else 0 < steps < providers.LIMIT


def test_jax_reaches_the_same() -> None:
    pytest.importorskip("jax", reason="not run: the extra peers is not installed")
    for target in (None, 15.0):
        peer = providers.Jax(CASE, target)
        found = {bench.LOOP: providers.loop(CASE, target)(_scans()[:3]), "JAX vmap": peer(_scans()[:3])}
        peer.close()
        bench._gate(found, target)


@pytest.mark.parametrize(("target", "off"), [(None, 0.02), (15.0, -0.1)])
def test_a_provider_that_is_off_gets_no_speed(target: float | None, off: float) -> None:
    right = (np.full(3, 15.0), 10.0)
    with pytest.raises(ParityError, match="no speed"):
        bench._gate({bench.LOOP: right, bench.OURS: (right[0] + off, 10.0)}, target)


def test_rows_become_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ROWS", tmp_path / "rows.jsonl")
    monkeypatch.setattr(bench, "PROVIDERS", TORCH)
    monkeypatch.setattr(bench, "CASES", {CASE.name: CASE})
    for target in bench.TARGETS[:1]:
        bench.measure(CASE, 3, target)
    rows = read_rows(bench.ROWS)
    assert {r["provider"] for r in rows} == set(TORCH)
    lines = bench.fits_table(rows)
    assert lines[0] == "| until | N = 3 | steps |"
    assert len(lines) == 3 + len(TORCH)
    assert all(line.endswith("| 10 |") for line in lines[3:])
