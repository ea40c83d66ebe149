"""Imports run one way: a module may import only from those above it in the list (and from its own folder)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [
    "kernels",
    "_version",
    "_checks",
    "_files",
    "_png",
    "_random",
    "reference",
    "ops",
    "nn",
    "models",
    "signals",
    "fitting",
    "datasets",
    "demo",
    "__init__",
    "benchmarks",
    "cli",
]
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
FILES = sorted((ROOT / "strainer_fast").rglob("*.py")) + sorted((ROOT / "kernels").glob("*.py")) + BENCHMARKS


def level(module: str) -> int:
    """Position of `strainer_fast.x.y` (or of the package itself) in ORDER."""
    parts = module.split(".")
    return ORDER.index(parts[1] if len(parts) > 1 else "__init__")


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                known = node.module == "strainer_fast" and alias.name in ORDER
                yield inner if known else node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_upward_import(path: Path) -> None:
    relative = path.relative_to(ROOT)
    inside_kernels = relative.parts[0] == "kernels"
    name = relative.parts[0] if path in BENCHMARKS or inside_kernels else relative.parts[1].removesuffix(".py")
    upward = [
        module
        for module in imported(ast.parse(path.read_text()))
        if module.split(".")[0] == "strainer_fast" and (inside_kernels or level(module) > ORDER.index(name))
    ]
    assert not upward, f"{relative} imports {upward}, which stand below it"


def test_only_the_bench_verb_imports_the_benchmarks() -> None:
    importing = [
        str(path.relative_to(ROOT))
        for path in FILES
        if path not in BENCHMARKS
        and any(m.startswith("strainer_fast.benchmarks") for m in imported(ast.parse(path.read_text())))
    ]
    assert importing == ["strainer_fast/cli/bench.py"]


def test_the_check_can_fail() -> None:
    tree = ast.parse("from strainer_fast.fitting import fit\nimport strainer_fast.cli")
    assert [level(m) > ORDER.index("nn") for m in imported(tree)] == [True, True]


def test_importing_the_package_loads_neither_triton_nor_matplotlib() -> None:
    import subprocess
    import sys

    # PyTorch itself may import triton; what counts is that we add nothing.
    code = (
        "import sys, torch; before = set(sys.modules); import strainer_fast; "
        "print([m for m in ('triton', 'matplotlib', 'typer') if m in sys.modules and m not in before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_all_names_exist() -> None:
    import strainer_fast

    for name in strainer_fast.__all__:
        assert hasattr(strainer_fast, name), name
