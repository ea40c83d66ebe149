"""The recipe `paper` against an independent implementation, written from the paper: modules, loops, torch.optim."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import strainer_fast as sf
from strainer_fast.fitting.start import signal_seed

OMEGA = 30.0


class PlainLayer(nn.Module):
    """sin(30 (W x + b))"""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(OMEGA * self.linear(x))


class PlainStrainer(nn.Module):
    """A shared encoder and a Python list of decoders."""

    def __init__(self, in_features: int, width: int, num_layers: int, channels: int, num_shared: int, num: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*(PlainLayer(width if i else in_features, width) for i in range(num_shared)))
        self.decoders = nn.ModuleList(
            nn.Sequential(
                *(PlainLayer(width, width) for _ in range(num_layers - 1 - num_shared)), nn.Linear(width, channels)
            )
            for _ in range(num)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.encoder(x)
        return [decoder(features) for decoder in self.decoders]


def coordinates(height: int, width: int) -> Tensor:
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    return torch.stack([rows[:, None].expand(height, width), columns.expand(height, width)], dim=-1).view(-1, 2)


def train(model: nn.Module, losses_of: object, steps: int) -> list[list[float]]:
    """Adam 1e-4 on the sum of the losses; returns each loss before each step, and after the last."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    curve = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses = losses_of(model)
        curve.append([loss.item() for loss in losses])
        sum(losses).backward()
        optimizer.step()
    with torch.no_grad():
        curve.append([loss.item() for loss in losses_of(model)])
    return curve


def assert_same_losses(ours_psnr: list, theirs: list[list[float]]) -> None:
    for n, psnr in enumerate(ours_psnr):
        ours = 10 ** (-torch.as_tensor(psnr, dtype=torch.float64) / 10)
        expected = torch.tensor([losses[n] for losses in theirs], dtype=torch.float64)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("num_shared", [5, 3], ids=["linear_decoders", "deep_decoders"])
def test_pretraining_has_the_papers_loss_curve(num_shared: int) -> None:
    scans = sf.signals.samples("brain-mri", size=20)[:4]
    architecture = sf.Architecture(num_shared_layers=num_shared)
    seen: list[list[float]] = []
    sf.pretrain(
        scans,
        sf.recipe("paper", pretrain_steps=50, check_every=1),
        architecture=architecture,
        on_check=lambda p: seen.append(p.psnr),
    )

    ours = sf.Strainer(2, 256, 6, 1, num_shared, len(scans))
    ours.reset_parameters(torch.Generator().manual_seed(0))
    plain = PlainStrainer(2, 256, 6, 1, num_shared, len(scans))
    with torch.no_grad():
        for layer, source in zip(plain.encoder, ours.encoder.layers, strict=True):
            layer.linear.weight.copy_(source.weight)
            layer.linear.bias.copy_(source.bias)
        for n, decoder in enumerate(plain.decoders):
            for layer, source in zip(decoder, [*ours.decoder, ours.head], strict=True):
                linear = layer if isinstance(layer, nn.Linear) else layer.linear
                linear.weight.copy_(source.weight[n])
                linear.bias.copy_(source.bias[n])
    points = coordinates(20, 20)
    images = [s.values.reshape(-1, 1) for s in scans]
    theirs = train(plain, lambda m: [nn.functional.mse_loss(o, i) for o, i in zip(m(points), images, strict=True)], 50)
    assert_same_losses([[row[n] for row in seen] for n in range(len(scans))], theirs)


def test_fit_from_an_encoder_has_the_papers_loss_curve(unseen: list[sf.Signal]) -> None:
    architecture = sf.Architecture()
    scans = sf.signals.samples("brain-mri", size=20)
    encoder = sf.pretrain(scans, sf.recipe("paper", pretrain_steps=20), architecture=architecture)
    photo = sf.signals.samples("photos", "test", size=(20, 24))[0]  # colour, and not square
    result = sf.fit(photo, encoder, sf.recipe("paper", steps=50, seed=5))

    seed = signal_seed(5, photo.fingerprint())
    start = sf.Siren.from_encoder(encoder, 3, generator=torch.Generator().manual_seed(seed))
    plain = PlainStrainer(2, 256, 6, 3, 5, 1)
    with torch.no_grad():
        for target, source in zip(plain.parameters(), start.parameters(), strict=True):
            target.copy_(source)
    points, image = coordinates(20, 24), photo.values.reshape(-1, 3)
    theirs = train(plain, lambda m: [nn.functional.mse_loss(m(points)[0], image)], 50)
    assert_same_losses([result.curves[0].psnr], theirs)
    assert result.psnr[0] == pytest.approx(-10 * math.log10(theirs[-1][0]), abs=1e-3)


def test_strainer_starts_ahead_of_siren_on_unseen_scans() -> None:
    train_scans, test_scans = (sf.signals.samples("brain-mri", split, size=32) for split in ("train", "test"))
    test_scans = test_scans[::2]
    encoder = sf.pretrain(train_scans, sf.recipe("paper", pretrain_steps=300))
    fits = {
        "siren": sf.fit(test_scans, "siren", sf.recipe("paper", steps=60)),
        "strainer": sf.fit(test_scans, encoder, sf.recipe("paper", steps=60)),
        "least_squares": sf.fit(test_scans, encoder, sf.recipe("paper", steps=60, start="least_squares")),
    }
    for step in (20, 40, 60):
        psnr = {name: np.array([c.psnr[step] for c in r.curves]) for name, r in fits.items()}
        assert (psnr["strainer"] > psnr["siren"]).mean() >= 0.8
        assert psnr["strainer"].mean() > psnr["siren"].mean() + 2
    start = {name: np.array([c.psnr[0] for c in r.curves]) for name, r in fits.items()}
    assert (start["least_squares"] > start["strainer"] + 5).all()
