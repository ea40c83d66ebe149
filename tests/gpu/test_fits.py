"""Whole fits and pre-training on a GPU: where the CPU ends, half precision within its bound, mixed precision."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import strainer_fast as sf
from strainer_fast.fitting import small
from strainer_fast.ops.fit_small import FitState, fit_small

pytestmark = pytest.mark.gpu

ARCHITECTURE = sf.Architecture(hidden_features=64, num_layers=4, num_shared_layers=3)


def losses(result: sf.FitResult) -> Tensor:
    return torch.stack([10 ** (-torch.from_numpy(curve.psnr).double() / 10) for curve in result.curves])


def test_a_fit_ends_where_the_cpus_does() -> None:
    signals = sf.signals.samples("brain-mri", size=32)[:3]
    recipe = sf.recipe("paper", steps=30, precision="fp32")
    ours, cpus = (sf.fit(signals, "siren", recipe, architecture=ARCHITECTURE, device=d) for d in ("cuda", "cpu"))
    assert ours.settings["environment"]["implementation"] == "triton (fp32), whole fits on chip"
    torch.testing.assert_close(losses(ours), losses(cpus), rtol=1e-3, atol=0)
    torch.testing.assert_close(torch.tensor(ours.psnr), torch.tensor(cpus.psnr), rtol=0, atol=0.01)
    for name, weight in ours.weights.items():
        torch.testing.assert_close(weight.cpu(), cpus.weights[name].cpu(), rtol=1e-3, atol=1e-4)


def test_steps_end_where_whole_fits_do(monkeypatch: pytest.MonkeyPatch) -> None:
    signals = sf.signals.samples("brain-mri", size=32)[:3]
    recipe = sf.recipe("paper", steps=30, precision="fp32")
    whole = sf.fit(signals, "siren", recipe, architecture=ARCHITECTURE, device="cuda")
    monkeypatch.setattr(small, "engine_of", lambda implementation, device: None)
    steps = sf.fit(signals, "siren", recipe, architecture=ARCHITECTURE, device="cuda")
    assert steps.settings["environment"]["implementation"] == "triton (fp32)"
    torch.testing.assert_close(losses(whole), losses(steps), rtol=1e-3, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_whole_small_fits_end_where_the_cpus_do(precision: str) -> None:
    """More networks than programs, with a target each and a guard; then the same bits from calls cut elsewhere."""
    num, steps = 700, 60
    networks = sf.BatchedSiren(num, 2, 32, 4, 1, (30.0, 30.0, 30.0))
    networks.reset_parameters(torch.Generator().manual_seed(0))
    points, values = sf.signals.grid((12, 12)), torch.rand(num, 144, 1, generator=torch.Generator().manual_seed(1))
    parameters = [p.detach() for p in networks.parameters()]
    given: dict[str, Any] = {"learning_rates": torch.full((steps,), 1e-4), "betas": (0.9, 0.999), "eps": 1e-8}
    given |= {"check_every": 5, "guard_db": 3.0, "target_psnr": torch.linspace(5.0, 12.0, num)}

    def fitted(device: str, *calls: int, **more: Any) -> FitState:
        state = FitState.fresh([p.to(device) for p in parameters], steps, True)
        for until in calls:
            fit_small(points.to(device), values.to(device), state, (30.0,) * 3, until=until, **given, **more)
        return state

    ours, again = fitted("cuda", steps, precision=precision), fitted("cuda", 7, 8, steps, precision=precision)
    cpus = fitted("cpu", steps)
    for name in ("mse", "step", "reason", "measured", "best_mse"):
        assert torch.equal(getattr(ours, name), getattr(again, name)), name
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters, again.parameters, strict=True))
    # A loss within rounding of a target may stop a check earlier or later.
    same = ours.step.cpu() == cpus.step
    assert int(same.sum()) >= 0.95 * num
    bound = 1e-3 if precision == "fp32" else 2e-2
    torch.testing.assert_close(ours.mse.cpu()[same], cpus.mse[same], rtol=bound, atol=0)
    assert int(ours.skipped.sum()) == 0


def test_pretraining_ends_where_the_cpus_does_and_so_does_a_fit_from_it() -> None:
    signals = sf.signals.samples("brain-mri", size=32)[:4]
    recipe = sf.recipe("paper", pretrain_steps=30, steps=20, precision="fp32")
    ours, cpus = (sf.pretrain(signals, recipe, architecture=ARCHITECTURE, device=d) for d in ("cuda", "cpu"))
    torch.testing.assert_close(torch.tensor(ours.record["psnr"]), torch.tensor(cpus.record["psnr"]), rtol=0, atol=0.01)
    for a, b in zip(ours.parameters(), cpus.parameters(), strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach().cpu(), rtol=1e-3, atol=1e-4)
    unseen = sf.signals.samples("brain-mri", "test", size=32)[:2]
    ends = [sf.fit(unseen, cpus, recipe, device=d).psnr for d in ("cuda", "cpu")]
    torch.testing.assert_close(torch.tensor(ends[0]), torch.tensor(ends[1]), rtol=0, atol=0.01)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_repeated_runs_are_equal_to_the_bit(precision: str) -> None:
    signals = sf.signals.samples("brain-mri", size=32)[:3]
    recipe = sf.recipe("paper", steps=40, pretrain_steps=40, precision=precision)
    fits = [sf.fit(signals, "siren", recipe, architecture=ARCHITECTURE, device="cuda") for _ in range(2)]
    assert fits[0].psnr == fits[1].psnr
    for name, weight in fits[0].weights.items():
        assert torch.equal(weight, fits[1].weights[name]), name
    encoders = [sf.pretrain(signals, recipe, architecture=ARCHITECTURE, device="cuda") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*(e.parameters() for e in encoders), strict=True))


def test_half_precision_stays_within_a_tenth_of_a_decibel() -> None:
    """The bound under which fits take fp16 by themselves: the paper's network on a scan of 178x178, 500 steps."""
    signals = sf.signals.samples("brain-mri")[:1]
    assert signals[0].shape == (178, 178)
    exact, half = (
        sf.fit(signals, "siren", sf.recipe("paper", steps=500, precision=p), device="cuda") for p in ("fp32", "fp16")
    )
    default = sf.fit(signals, "siren", sf.recipe("paper", steps=1), device="cuda")
    assert default.settings["environment"]["implementation"] == "triton (fp16)"
    assert exact.psnr[0] > float(exact.curves[0].psnr[0])
    assert abs(exact.psnr[0] - half.psnr[0]) <= 0.1


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        sf.SineLinear(2, 64, is_first=True, implementation="triton"),
        sf.SineLinear(64, 64, implementation="triton"),
        sf.MultiHeadLinear(1, 64, 1, implementation="triton"),
    ).cuda()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_autocast_and_grad_scaler(dtype: torch.dtype) -> None:
    signal = sf.signals.samples("brain-mri", size=48)[0]
    points, values = signal.points().cuda(), signal.samples().cuda()

    def train(mixed: bool, steps: int = 100) -> tuple[list[Tensor], list[float]]:
        """First gradients, losses."""
        model, first, seen = network(), [], []
        adam, scaler = torch.optim.Adam(model.parameters(), lr=1e-3), torch.amp.GradScaler("cuda", enabled=mixed)
        for _ in range(steps):
            adam.zero_grad()
            with torch.autocast("cuda", dtype=dtype, enabled=mixed):
                y = model(points)[0]
            assert y.dtype == (dtype if mixed else torch.float32)  # the head follows autocast, the sines do not
            loss = (y.float() - values).square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(adam)
            first = first or [p.grad.clone() for p in model.parameters() if p.grad is not None]
            scaler.step(adam)
            scaler.update()
            seen.append(float(loss.detach()))
        assert all(p.isfinite().all() for p in model.parameters())
        return first, seen

    (mixed, losses_mixed), (exact, losses_exact) = train(True), train(False)
    bound = 16 * (2.0**-11 if dtype == torch.float16 else 2.0**-8)
    for a, b in zip(mixed, exact, strict=True):
        assert float((a - b).norm() / b.norm()) <= bound
    assert losses_exact[-1] < losses_exact[0] / 2
    assert abs(losses_mixed[-1] - losses_exact[-1]) <= 0.1 * losses_exact[-1]
