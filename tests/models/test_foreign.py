"""Checkpoints of other libraries: look-alikes of their layouts, written from their documented structure."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import strainer_fast as sf


class Scaled(nn.Module):
    """sin(omega x) as a parameterless module, so that it takes an index in a list."""

    def __init__(self, omega: float) -> None:
        super().__init__()
        self.omega = omega

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.omega * x)


def chain(sizes: list[int], omegas: list[float], bias: bool = True) -> list[nn.Module]:
    """Linear, sine, linear, sine, ..., linear."""
    modules: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        modules.append(nn.Linear(a, b, bias=bias))
        if i < len(omegas):
            modules.append(Scaled(omegas[i]))
    return modules


def run(modules: object, x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


class AlpineSiren(nn.Module):
    """model.0, model.2, ... with sines between."""

    def __init__(self, omegas: list[float], bias: bool = True) -> None:
        super().__init__()
        self.model = nn.ModuleList(chain([2, 16, 16, 16, 3], omegas, bias))

    def forward(self, x: Tensor) -> Tensor:
        return run(self.model, x)


class AlpineStrainer(nn.Module):
    """encoder.0, encoder.2, ... and decoder.n.0, decoder.n.2, ...; outputs [P, N, C]."""

    def __init__(self, num_shared: int, omega: float) -> None:
        super().__init__()
        sizes = [2, 16, 16, 16, 1]
        self.encoder = nn.ModuleList(chain(sizes[: num_shared + 1], [omega] * num_shared))
        self.decoder = nn.ModuleList(
            nn.ModuleList(chain(sizes[num_shared:], [omega] * (3 - num_shared))) for _ in range(11)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([run(decoder, run(self.encoder, x)) for decoder in self.decoder], dim=1)


class NotebookLayer(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.linear = nn.Linear(a, b)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30.0 * self.linear(x))


class Nested(nn.Module):
    """A module whose only child is called net."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def notebook() -> nn.Module:
    """net.0.linear, net.1.linear, ..., net.3"""
    return Nested(nn.Sequential(NotebookLayer(2, 16), NotebookLayer(16, 16), NotebookLayer(16, 16), nn.Linear(16, 3)))


def repository() -> nn.Module:
    """net.net.0.0, net.net.1.0, ...: blocks of (linear, sine), the last of a linear alone."""
    blocks = [nn.Sequential(nn.Linear(a, 16), Scaled(30.0)) for a in (2, 16, 16)]
    return Nested(Nested(nn.Sequential(*blocks, nn.Sequential(nn.Linear(16, 3)))))


class LucidLayer(nn.Module):
    def __init__(self, a: int, b: int, omega: float | None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(b, a) / 4), nn.Parameter(torch.randn(b) / 4)
        self.omega = omega

    def forward(self, x: Tensor) -> Tensor:
        z = nn.functional.linear(x, self.weight, self.bias)
        return z if self.omega is None else torch.sin(self.omega * z)


class LucidSiren(nn.Module):
    """layers.0, ..., last_layer; omega 30 first and 1 behind."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([LucidLayer(2, 16, 30.0), LucidLayer(16, 16, 1.0), LucidLayer(16, 16, 1.0)])
        self.last_layer = LucidLayer(16, 3, None)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(run(self.layers, x))


POINTS = torch.rand(50, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(
    ("build", "layout", "omega"),
    [
        (lambda: AlpineSiren([30.0] * 3), "alpine", None),
        (lambda: AlpineSiren([30.0, 10.0, 5.0]), "alpine", (30.0, 10.0, 5.0)),
        (lambda: AlpineSiren([30.0] * 3, bias=False), "alpine", None),
        (notebook, "vsitzmann", None),
        (repository, "vsitzmann", None),
        (lambda: repository().net, "vsitzmann", None),
        (LucidSiren, "siren-pytorch", None),
        (lambda: Nested(LucidSiren()), "siren-pytorch", None),
    ],
    ids=[
        "alpine",
        "alpine_omegas",
        "alpine_no_bias",
        "notebook",
        "SingleBVPNet",
        "FCBlock",
        "SirenNet",
        "SirenWrapper",
    ],
)
def test_siren_layouts(build: object, layout: str, omega: object) -> None:
    original = build()
    loaded = sf.load_foreign(original.state_dict(), layout, omega)
    assert isinstance(loaded, sf.Siren)
    torch.testing.assert_close(loaded(POINTS), original(POINTS), atol=1e-6, rtol=0)


def test_omega_matters() -> None:
    original = AlpineSiren([10.0] * 3)
    wrong, right = (sf.load_foreign(original.state_dict(), "alpine", omega) for omega in (None, 10.0))
    assert (wrong(POINTS) - original(POINTS)).abs().max() > 1e-3
    torch.testing.assert_close(right(POINTS), original(POINTS), atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_shared", [1, 2, 3])
def test_alpine_strainer(num_shared: int) -> None:
    original = AlpineStrainer(num_shared, omega=20.0)
    loaded = sf.load_foreign(original.state_dict(), "alpine", omega=20.0)
    assert isinstance(loaded, sf.Strainer)
    torch.testing.assert_close(loaded(POINTS), original(POINTS).transpose(0, 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(loaded.encoder(POINTS), run(original.encoder, POINTS), atol=1e-6, rtol=0)


def test_from_a_file_and_in_double(tmp_path: Path) -> None:
    original = AlpineSiren([30.0] * 3).double()
    torch.save(original.state_dict(), tmp_path / "siren.pt")
    loaded = sf.load_foreign(tmp_path / "siren.pt", "alpine")
    x = POINTS.double()
    assert torch.equal(loaded(x), original(x))


def test_a_pickled_module_is_not_executed(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for name in ("module.pt", "junk.pt"):
        with pytest.raises(sf.InputError, match="a state_dict that loads with weights_only=True"):
            sf.load_foreign(tmp_path / name, "alpine")


@pytest.mark.parametrize(
    ("state", "layout", "message"),
    [
        (AlpineSiren([30.0] * 3).state_dict(), "alpin", "layout: expected one of 'alpine', 'vsitzmann'"),
        (LucidSiren().state_dict(), "alpine", "only parameters of its SIREN, got 'layers.0.weight'"),
        ({}, "alpine", "a weight"),
        ({"model": {}}, "alpine", "flat state_dict"),
        ({"model.0.weight": torch.zeros(4, 2), "model.2.weight": torch.zeros(1, 5)}, "alpine", "one width"),
        ({"encoder.0.weight": torch.zeros(4, 2)}, "alpine", "decoders 0, 1"),
        ({f"net.{i}.0.weight": torch.zeros(2, 2) for i in (0, 1, 3)}, "vsitzmann", r"without a gap, got \[0, 1, 3\]"),
        ({"encoder.0.weight": torch.zeros(4, 2), "decoder.0.0.bias": torch.zeros(4)}, "alpine", "weight"),
    ],
)
def test_what_does_not_belong_is_named(state: dict, layout: str, message: str) -> None:
    with pytest.raises(sf.InputError, match=message):
        sf.load_foreign(state, layout)
