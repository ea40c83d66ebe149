"""A fitted network drawn at 178, 1024 and 4096 squared pixels, as a crop, and into files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import strainer_fast as sf
from strainer_fast import reference
from strainer_fast.benchmarks.harness import OURS, Gate, Named, Provider, Record, Row, Running, equals, measure

CHUNK = 2**16
"""Points at a time, of the peers that bound their memory; the fastest of 2^14, 2^16, 2^18."""
WHOLE = 2**20
"""Points up to which peers are tried on a whole image: all activations of a layer are in memory at once."""
HALF_A_LEVEL = 0.501
CHECKED = 2**14
"""Pixels that the gate looks at, spread over the image."""


@dataclass(frozen=True)
class RenderCase:
    """A grid of a network of six layers 256 wide, three channels."""

    name: str
    size: int
    window: tuple[tuple[float, float], ...] | None = None
    rounds: int = 5
    quick: bool = False

    @property
    def flops(self) -> int:
        """Of the products; sines do not count."""
        return self.size**2 * 2 * (2 * 256 + 4 * 256 * 256 + 256 * 3)

    @property
    def axes(self) -> dict[str, int]:
        """What plots have on their axes."""
        return {"points": self.size**2}


CASES = (
    RenderCase("178x178", 178, rounds=11, quick=True),
    RenderCase("a crop at 512x512", 512, ((-0.25, 0.0), (0.1, 0.35))),
    RenderCase("1024x1024", 1024, rounds=3),
    RenderCase("4096x4096", 4096, rounds=1),
)


@dataclass(frozen=True)
class RenderProblem:
    """A network and the grid."""

    network: sf.Siren
    case: RenderCase
    device: str

    @property
    def points(self) -> Tensor:  # [P, 2]
        """All of them."""
        return sf.signals.grid((self.case.size, self.case.size), self.case.window).to(self.device)

    def sample(self) -> Tensor:
        """Which of the pixels are compared."""
        total = self.case.size**2
        return torch.linspace(0, total - 1, min(total, CHECKED), dtype=torch.float64).long()

    def truth(self) -> Named:
        """In float64, of the sampled pixels."""
        points = self.points[self.sample()].double()
        parameters = [p.detach().double() for p in self.network.parameters()]
        return {"values": reference.siren(points, parameters[::2], parameters[1::2], self.network.omegas)}


def _running(problem: RenderProblem, draw: Callable[[], Tensor]) -> Running:
    sample = problem.sample()

    def results() -> Named:
        return {"values": draw().reshape(problem.case.size**2, -1)[sample].to(problem.device)}

    return Running(draw, results)


def ours(problem: RenderProblem) -> Running:
    """`render`, into memory."""
    p = problem
    return _running(p, lambda: sf.render(p.network, p.case.size, p.case.window))


def ours_into(suffix: str, problem: RenderProblem) -> Running:
    """`render_to`: a PNG, or the values as they are."""
    p, folder = problem, tempfile.TemporaryDirectory()
    path = Path(folder.name) / f"image{suffix}"

    def draw() -> Path:
        return sf.render_to(p.network, path, p.case.size, p.case.window)

    def results() -> Named:
        if draw().suffix == ".npy":
            pixels = np.load(path, mmap_mode="r")
        else:
            with Image.open(path) as image:
                pixels = np.asarray(image)
        chosen = pixels.reshape(-1, 3)[p.sample().numpy()].astype(np.float32)
        return {"values": torch.from_numpy(chosen).to(p.device)}

    return Running(draw, results, close=folder.cleanup)


def rounded(problem: RenderProblem) -> Gate:
    """What 8 bits can hold: no pixel may be further than half a level from the clamped value."""
    exact = 255 * problem.truth()["values"].clamp(0, 1)

    def gate(got: Named) -> Row:
        off = float((got["values"] - exact).abs().max())
        return {"right": off <= HALF_A_LEVEL, "error": off, "bound": HALF_A_LEVEL, "where": "levels of 255"}

    return gate


def eager(chunk: int, compiled: bool, problem: RenderProblem) -> Running:
    """An nn.Sequential in no_grad mode, some points at a time."""
    p = problem

    class Sine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(30.0 * x)

    layers: list[nn.Module] = []
    for layer in [cast(sf.SineLinear, each) for each in p.network.layers]:
        linear = nn.Linear(layer.in_features, layer.out_features)
        linear.load_state_dict(layer.state_dict())
        layers += [linear, Sine()]
    head = nn.Linear(p.network.head.in_features, p.network.head.out_features)
    head.load_state_dict(p.network.head.state_dict())
    network = nn.Sequential(*layers, head).to(p.device)
    return _running(p, partial(_by_chunks, torch.compile(network) if compiled else network, chunk, p))


@torch.no_grad()
def _by_chunks(network: Callable[[Tensor], Tensor], chunk: int, problem: RenderProblem) -> Tensor:
    return torch.cat([network(points).cpu() for points in problem.points.split(chunk)])


def siren_pytorch(problem: RenderProblem) -> Running:
    """SirenNet of the package siren-pytorch with the same weights."""
    import siren_pytorch as package

    p = problem
    network = package.SirenNet(
        dim_in=2, dim_hidden=256, dim_out=3, num_layers=5, w0_initial=p.network.omegas[0], w0=p.network.omegas[1]
    )
    for layer, own in zip([*network.layers, network.last_layer], [*p.network.layers, p.network.head], strict=True):
        layer.load_state_dict(own.state_dict())
    return _running(p, partial(_by_chunks, network.to(p.device), CHUNK, p))


def providers(case: RenderCase, quick: bool) -> list[Provider]:
    """Ours first."""
    found = [
        Provider(OURS, ours),
        Provider(f"{OURS}, into a PNG", partial(ours_into, ".png"), gate=rounded),
        Provider("PyTorch, in chunks", partial(eager, CHUNK, False)),
    ]
    if case.size**2 <= WHOLE:
        found.append(Provider(f"{OURS}, into a .npy", partial(ours_into, ".npy")))
        found.append(Provider("PyTorch, whole image", partial(eager, WHOLE, False)))
        found.append(Provider("siren-pytorch, in chunks", siren_pytorch, "siren_pytorch"))
        if not quick:
            found.append(Provider("torch.compile, in chunks", partial(eager, CHUNK, True)))
    return found


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=[pytest.mark.quick] * c.quick) for c in CASES])
def test_render(benchmark: Any, case: RenderCase, device: str, quick: bool, record: Record) -> None:
    """Every provider against float64 on some pixels, then all in turn."""
    torch.manual_seed(0)
    torch.compiler.reset()
    problem = RenderProblem(sf.Siren(2, 256, 6, 3).to(device), case, device)
    benchmark.group = case.name
    measure(
        benchmark,
        record,
        {"suite": "render", "table": "render", "case": case.name, "threads": 2, "axes": case.axes},
        providers(case, quick),
        problem,
        equals(problem.truth()),
        rounds=case.rounds,
        device=device,
        flops=case.flops,
    )
