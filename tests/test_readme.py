"""README's Python (and that of docs/datasets.md) runs as it stands, and its commands and files exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DATASETS = (ROOT / "docs" / "datasets.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README + DATASETS, re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=[f"example_{i}" for i in range(len(EXAMPLES))])
def test_example_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_linked_files_exist() -> None:
    for link in re.findall(r"\]\(((?!http)[^)#]+)", README):
        assert (ROOT / link).exists(), link


def test_verbs_and_options_exist() -> None:
    import inspect

    from strainer_fast import cli

    for command in re.findall(r"^\s*strainer-fast (.+?)(?:#.*)?$", README + DATASETS, re.MULTILINE):
        verb, *words = command.split()
        parameters = inspect.signature(getattr(cli, verb.replace("-", "_"))).parameters
        for word in words:
            if word.startswith("--"):
                name = word.removeprefix("--").replace("-", "_")
                assert name in parameters, f"strainer-fast {verb} {word}"
