"""Rows of the table of tiles as text: how the tuner writes tiles.py anew."""

import ast
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path

from . import tiles as tiles_module
from .aot import write
from .cases import row_name
from .tiles import ANY, Row


def same_place(a: Row, b: Row) -> bool:
    """Whether two rows differ at most in their tiles; heads rows for other numbers of columns are other rows."""
    columns = a.kernel != "heads" or a.tiles.outputs == b.tiles.outputs
    return columns and replace(a, tiles=b.tiles) == b


def literal(row: Row) -> str:
    """A row as it stands in tiles.py."""
    names = {tiles_module.HALF: "HALF", tiles_module.TF32: "TF32", tiles_module.TF32X3: "TF32X3",
             tiles_module.FP32: "FP32", tiles_module.FLOAT32: "FLOAT32"}  # fmt: skip
    precisions = names.get(row.precisions) or "(" + ", ".join(f'"{p}"' for p in row.precisions) + ")"
    sizes = f"Tiles({', '.join(map(str, astuple(row.tiles)))})"
    width = "ANY" if row.width == ANY else str(row.width)
    return f'Row("{row.kernel}", "{row.generation}", {precisions}, {width}, {sizes}{", few=True" if row.few else ""}),'


def rewrite(text: str, rows: Sequence[Row]) -> str:
    """tiles.py with other rows in its table, one a line, in the same order; comments stay before their rows.

    Raises ValueError where the rows are not those of the text but for their tiles.
    """
    tree = ast.parse(text)
    assign = next(node for node in tree.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "TABLE")
    assert isinstance(assign.value, ast.Tuple), "the table is written as a tuple"
    lines, names = text.splitlines(), vars(tiles_module)
    written, left, seen = [], list(rows), assign.lineno
    for element in assign.value.elts:
        between = lines[seen : element.lineno - 1]
        written += [line for line in between if line.strip().startswith("#")]
        expression = ast.fix_missing_locations(ast.Expression(ast.Tuple([element], ast.Load())))
        for old in eval(compile(expression, "tiles.py", "eval"), dict(names)):
            if not left or not same_place(old, left[0]):
                raise ValueError(
                    f"rows: expected one for {row_name(old)} next, got {left[:1]}. Keep the table's order."
                )
            written.append("    " + literal(left.pop(0)))
        seen = element.end_lineno or seen
    if left:
        raise ValueError(f"rows: expected no more than the file has, got {len(left)} more, {row_name(left[0])} first.")
    end = assign.end_lineno or len(lines)
    return "\n".join([*lines[: assign.lineno], *written, *lines[end - 1 :]]) + "\n"


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Put rows into a tiles.py, which is read back before it replaces the old one.

    Raises ValueError as `rewrite`, or if Python reads other rows than were meant.
    """
    text = rewrite(path.read_text(encoding="utf-8"), rows)
    names: dict[str, object] = {"__name__": tiles_module.__name__}  # dataclasses look their module up
    exec(compile(text, str(path), "exec"), names)
    if [repr(row) for row in names["TABLE"]] != [repr(row) for row in rows]:  # type: ignore[attr-defined]
        raise ValueError(f"{path}: expected the tuned rows when read back, got others. The old file is untouched.")
    write(path, text)
