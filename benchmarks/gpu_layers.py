"""Kernels of single layers, each checked against float64 and measured against the same in PyTorch's calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from strainer_fast.benchmarks.gpu_parts import GRAPHED, Bench, matmul, timed
from strainer_fast.benchmarks.harness import Call, Named, Row, Rows, attempt, judge


@dataclass(frozen=True)
class Part:
    """A layer's kernel alone: it overwrites `results`; the peer does as much in PyTorch's calls."""

    name: str
    launch: Call
    results: Callable[[], Named]
    want: Named
    peer: Callable[[], Named]


def parts(precision: str, points: int, width: int, columns: int, device: str) -> list[Part]:
    """Hidden layer forward, backward to the features and to the weights, and heads with their loss."""
    from strainer_fast.kernels.heads import fuses, heads_splits, launch_heads_loss
    from strainer_fast.kernels.layers import launch_forward, launch_input_gradient, launch_weight_gradient, splits_for
    from strainer_fast.kernels.segments import DTYPES

    operand, generator = DTYPES[precision], torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = operand) -> Tensor:
        # Rounded before the truth is computed: what is judged is the kernel, not its inputs.
        return ((torch.rand(shape, generator=generator, device="cpu") * 2 - 1) * scale).to(dtype).to(device)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, math.nan, dtype=dtype, device=device)

    spread = math.sqrt(6 / width)
    x, w, b = draw(points, width), draw(1, width, width, scale=spread), draw(1, width, scale=0.1, dtype=torch.float32)
    dz, y, cosine, dx = draw(1, points, width), *(empty(1, points, width, dtype=operand) for _ in range(3))
    # In tf32 the matrix unit reads along its reduction, so steps keep a turned copy.
    turned = w.mT.contiguous().mT if precision == "tf32" else w
    dw = empty(splits_for(points, width, width, 1, precision), 1, width, width)
    how: dict[str, Any] = {"precision": precision}
    db, half_b = empty(*dw.shape[:3]), b[0].to(operand)
    x64, w64, dz64 = x.double(), w[0].double(), dz[0].double()
    z64 = x64 @ w64.T + b[0].double()

    def forward() -> None:
        launch_forward(x, w, b, y, cosine=cosine, omega=1.0, operand=True, **how)

    def forward_peer() -> Named:
        with matmul(precision):
            z = functional.linear(x, w[0], half_b)
        return {"y": z.sin(), "cosine": z.cos()}

    def input_gradient() -> None:
        launch_input_gradient(dz, turned, dx, cosine, operand=True, **how)

    def weight_gradient() -> None:
        launch_weight_gradient(dz, x, dw, db, **how)

    def input_peer() -> Named:
        with matmul(precision):
            return {"dx": (dz[0] @ w[0]) * cosine[0]}

    def weight_peer() -> Named:
        with matmul(precision):
            return {"dw": dz[0].T @ x, "db": dz[0].sum(0)}

    forward()  # the backward pass reads its cosine
    found = [
        Part("forward", forward, lambda: {"y": y[0], "cosine": cosine[0]}, {"y": z64.sin(), "cosine": z64.cos()},
             forward_peer),
        Part("dX", input_gradient, lambda: {"dx": dx[0]}, {"dx": (dz64 @ w64) * cosine[0].double()}, input_peer),
        Part("dW", weight_gradient, lambda: {"dw": dw.sum(0)[0], "db": db.sum(0)[0]},
             {"dw": dz64.T @ x64, "db": dz64.sum(0)}, weight_peer),
    ]  # fmt: skip
    if not fuses(columns, width, precision):
        return found

    splits = heads_splits(points, 1, columns, width, precision)
    v, c = draw(1, columns, width, scale=spread), draw(1, columns, scale=0.1, dtype=torch.float32)
    values, scale = draw(columns, points, 1, dtype=torch.float32), torch.full((columns,), 2.0, device=device)
    sums, dv, dc = empty(splits, 1, columns), empty(splits, 1, columns, width), empty(splits, 1, columns)
    h, v64, target, half_c = x.unsqueeze(0), v[0].double(), values[..., 0].T, c[0].to(operand)
    r64 = x64 @ v64.T + c[0].double() - target.double()
    g64 = 2 * r64

    def heads() -> None:
        launch_heads_loss(h, v, c, values, scale, sums, cosine=cosine, dz=dx, dw=dv, db=dc, **how)

    def heads_peer() -> Named:
        with matmul(precision):
            r = functional.linear(x, v[0], half_c).float() - target
            g = (2 * r).to(operand)
            return {"sums": r.square().sum(0), "dz": (g @ v[0]) * cosine[0], "dw": g.T @ x, "db": g.sum(0)}

    def heads_results() -> Named:
        return {"sums": sums.sum(0)[0], "dz": dx[0], "dw": dv.sum(0)[0], "db": dc.sum(0)[0]}

    want = {"sums": r64.square().sum(0), "dz": (g64 @ v64) * cosine[0].double(), "dw": g64.T @ x64, "db": g64.sum(0)}
    return [*found, Part(f"heads, {columns} columns", heads, heads_results, want, heads_peer)]


def layer_rows(precision: str, bench: Bench, points: int, width: int, columns: Sequence[int]) -> Rows:
    """Kernels of single layers against the same in PyTorch's calls, both in CUDA graphs."""
    found: list[Part] = []
    rows: Rows = []
    for count in columns:

        def make(count: int = count) -> Row:
            return {"parts": parts(precision, points, width, count, bench.device)}

        made = attempt(make)
        if "refused" in made:
            rows.append({"case": "all", "precision": precision, "provider": "strainer_fast", **made})
            continue
        found += made["parts"][3 if found else 0 :]
    for part in found:
        products = 3 * part.want["sums"].numel() if "sums" in part.want else width
        able: Rows = []
        calls = []

        def own(part: Part = part) -> Named:
            part.launch()
            return part.results()

        for name, results, call in (("strainer_fast", own, part.launch), ("PyTorch", part.peer, part.peer)):

            def compared(results: Callable[[], Named] = results, call: Call = call, part: Part = part) -> Row:
                found = judge(results(), part.want, precision)
                return found | ({"call": bench.record(call, GRAPHED)} if found["right"] else {})

            row: Row = {"case": part.name, "precision": precision, "provider": name}
            row |= {"flops": 2 * points * width * products, **attempt(compared)}
            if row["right"]:
                able.append(row)
                calls.append(row.pop("call"))
            rows.append(row)
        timed(able, calls, bench, GRAPHED)
    return rows
