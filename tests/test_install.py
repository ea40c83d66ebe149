"""Wheels with and without a compiler: both install and work, and say what they have."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE")
TRY = """
import torch, strainer_fast as sf
from strainer_fast.kernels import cpu
fit = sf.fit(torch.rand(8, 8, 1), recipe=sf.recipe("paper", steps=3), architecture=sf.Architecture(8, 3, 2))
print(cpu.level(), fit.steps, sf.explain("paper", [(8, 8, 1)], architecture=sf.Architecture(8, 3, 2)))
"""


def source(folder: Path) -> Path:
    """A copy without what building leaves behind."""
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("kernels", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    links = {"kernels", "benchmarks"}
    shutil.copytree(
        ROOT / "strainer_fast", folder / "strainer_fast", ignore=lambda d, n: {*ignore(d, n), *links} & set(n)
    )
    return folder


def installed(tmp_path: Path, **environment: str) -> tuple[list[str], str]:
    """Build a wheel, unpack it, run TRY on it; names in the wheel and what was printed."""
    work = tmp_path / "source"
    work.mkdir()
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*command, str(source(work))], check=True, env=os.environ | environment, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
        names = wheel.namelist()
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1]);" + TRY, str(tmp_path / "site")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return names, done.stdout


@pytest.mark.long
def test_with_a_compiler(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("not run: no g++ here")
    names, printed = installed(tmp_path)
    assert any("kernels/cpu/_engine" in name for name in names)
    assert {"strainer_fast/benchmarks/run.py", "strainer_fast/benchmarks/datasets/cases.py"} <= set(names)
    assert not any(name.endswith((".cpp", ".h", ".inl")) for name in names)
    assert printed.split()[0] in ("avx512", "avx2", "portable")
    assert "fit_small" in printed


@pytest.mark.long
def test_without_a_compiler(tmp_path: Path) -> None:
    names, printed = installed(tmp_path, CC="false", CXX="false")
    assert not any("_engine" in name for name in names)
    assert printed.startswith("None [3]")
    assert "not built: no C++ compiler" in printed


@pytest.mark.long
def test_the_source_distribution_can_be_built(tmp_path: Path) -> None:
    code = "from setuptools import build_meta; import sys; print(build_meta.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=source_folder(tmp_path), check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "out")
    inside = {path.name for path in (tmp_path / "out").rglob("*")}
    sources = [path for end in ("cpp", "h", "inl") for path in (ROOT / "kernels" / "cpu").glob(f"*.{end}")]
    assert {path.name for path in sources} <= inside


def source_folder(tmp_path: Path) -> Path:
    """A fresh folder with the sources."""
    folder = tmp_path / "sdist_source"
    folder.mkdir()
    return source(folder)
