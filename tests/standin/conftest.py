"""The stand-in replaces parts of torch for the whole process, so these tests have one of their own."""

from pathlib import Path

import pytest

from tests import standin

standin.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse to run beside others, which would meet the stand-in too."""
    here = Path(__file__).parent
    strangers = [item.nodeid for item in items if here not in item.path.parents]
    if strangers:
        raise pytest.UsageError(f"tests/standin: expected a process of its own, got {strangers[0]} beside it.")
