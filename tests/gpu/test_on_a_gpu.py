"""What only a GPU can show; run there with `pytest -m gpu tests/gpu`. Skipped elsewhere."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import strainer_fast as sf
from strainer_fast.fitting.optim import Adam
from strainer_fast.fitting.stepper import TritonStepper, make_stepper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: no CUDA GPU here"),
]


def stepper(precision: str = "fp32", size: int = 64) -> TritonStepper:
    torch.manual_seed(0)
    model = sf.BatchedSiren(1, 2, 256, 6, 3).cuda()
    parameters = [p for layer in [*model.layers, model.head] for p in (layer.weight, layer.bias)]
    points = sf.signals.grid((size, size)).cuda()
    values = (0.5 + 0.5 * torch.sin(9 * points[:, :1] * points[:, 1:])).expand(-1, 3)[None].contiguous()
    adam = Adam(parameters, sf.recipe(learning_rate=1e-4), 1)
    made = make_stepper(
        points, values, parameters, [30.0] * 5, adam, implementation="triton", precision=precision, independent=True,
        keep=True,
    )  # fmt: skip
    assert isinstance(made, TritonStepper)
    return made


def run(steps: int, made: TritonStepper) -> Tensor:
    for _ in range(steps):
        made.evaluate(True)
        made.update()
    return made.flat.clone()


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_recorded_steps_have_the_bits_of_launched_ones(precision: str) -> None:
    recorded, launched = stepper(precision), stepper(precision)
    for replayed in (launched._evaluate, launched._update):
        replayed.calls = 2  # past the call that records
    a, b = run(6, recorded), run(6, launched)
    assert recorded._evaluate.graph is not None
    assert recorded._update.graph is not None
    assert launched._evaluate.graph is None
    assert torch.equal(a, b)
    assert torch.equal(a, run(6, stepper(precision)))


def test_a_step_neither_waits_nor_allocates() -> None:
    made = stepper("fp16")
    run(3, made)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            for _ in range(5):
                made._evaluate(made._launch_gradients)
                made._update(made._launch_adam)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


# Tracers instantiate Functions and warn about themselves.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("what", ["layers", "one_pass"])
def test_compiles_with_its_backward_pass(what: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(sf.SineLinear(2, 64, is_first=True), sf.SineLinear(64, 64), nn.Linear(64, 1)).cuda()
    siren = sf.Siren(2, 64, 4, 1).cuda()
    points, values = torch.rand(1000, 2, device="cuda"), torch.rand(1000, 1, device="cuda")

    def by_layers() -> Tensor:
        return nn.functional.mse_loss(model(points), values)

    def by_one_pass() -> Tensor:
        return siren.loss(points, values)

    call: Callable[[], Tensor] = {"layers": by_layers, "one_pass": by_one_pass}[what]
    parameters = list((model if what == "layers" else siren).parameters())
    plain = torch.autograd.grad(call(), parameters)
    compiled = torch.autograd.grad(torch.compile(call, fullgraph=True)(), parameters)
    for a, b in zip(compiled, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_half_precision_ends_within_a_tenth_of_a_decibel() -> None:
    scan = sf.signals.samples("brain-mri", "test", size=178)[0]
    ends = [sf.fit(scan, "siren", sf.recipe(steps=500, precision=p), device="cuda").psnr[0] for p in ("fp32", "fp16")]
    assert abs(ends[0] - ends[1]) <= 0.1


def test_fit_and_pretraining_end_as_on_the_cpu() -> None:
    scans = sf.signals.samples("brain-mri", size=32)[:3]
    small = sf.Architecture(hidden_features=64, num_layers=4, num_shared_layers=3)
    recipe = sf.recipe(steps=50, pretrain_steps=50, precision="fp32")
    encoders = [sf.pretrain(scans, recipe, architecture=small, device=d) for d in ("cuda", "cpu")]
    for a, b in zip(encoders[0].record["psnr"], encoders[1].record["psnr"], strict=True):
        assert a == pytest.approx(b, abs=0.02)
    fits = [sf.fit(scans, encoders[1], recipe, device=d).psnr for d in ("cuda", "cpu")]
    assert fits[0] == pytest.approx(fits[1], abs=0.05)


def test_a_gradient_scaler_trains_the_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(sf.SineLinear(2, 64, is_first=True), sf.SineLinear(64, 64), nn.Linear(64, 1)).cuda()
    points = sf.signals.grid((32, 32)).cuda()
    values = points[:, :1] * points[:, 1:]
    optimizer, scaler = torch.optim.Adam(model.parameters(), lr=1e-3), torch.amp.GradScaler("cuda")
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = nn.functional.mse_loss(model(points).float(), values)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
