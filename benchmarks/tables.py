"""Markdown tables of rows, for every suite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from strainer_fast.benchmarks.harness import OURS, Row, Rows


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(row: dict[str, Any], unit: float = 1.0) -> str:
    """Median (p20 to p80), three digits; nothing for a row that was refused."""
    if "median_ms" not in row:
        return "-"
    median, low, high = (number(unit * row[name]) for name in ("median_ms", "p20_ms", "p80_ms"))
    return f"{median} ({low} to {high})"


def number(value: float) -> str:
    """Three digits, and no exponent: 1230 rather than 1.23e+03."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
