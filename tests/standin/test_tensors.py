"""The stand-in refuses what a GPU refuses, and counts where the host waits."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from strainer_fast.kernels.trig import launch_sincos
from tests import standin

CUDA = torch.device("cuda", 0)


def there(*shape: int) -> Tensor:
    return torch.randn(*shape, device=CUDA)


@pytest.mark.parametrize(
    "call",
    [
        lambda: there(3) + torch.ones(3),
        lambda: torch.where(there(3) > 0, torch.ones(3), torch.zeros(3)),
        lambda: torch.cat([there(3), torch.ones(3)]),
        lambda: there(2, 2) @ torch.ones(2, 2),
        lambda: torch.rand(3, device="cuda", generator=torch.Generator()),
    ],
    ids=["add", "where", "cat", "product", "generator"],
)
def test_two_devices_are_refused(call: Callable[[], Tensor]) -> None:
    with pytest.raises(RuntimeError, match="Expected"):
        call()


def test_numbers_of_the_host_are_taken() -> None:
    assert (torch.ones(2, device="cuda") * torch.tensor(3.0)).tolist() == [3.0, 3.0]


def test_host_memory_is_no_kernels() -> None:
    x = torch.linspace(-3, 3, 100, device="cuda")
    sine, cosine = torch.empty_like(x), torch.empty_like(x)
    with standin.counted() as counts:
        launch_sincos(x, sine, cosine)
    assert counts.total("launches") == 1 and "kernels/trig.py" in next(iter(counts.launches))
    torch.testing.assert_close(sine.cpu(), torch.linspace(-3, 3, 100).sin(), rtol=0, atol=1e-6)
    from tests.standin import device

    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        device.refuse_host("sincos_kernel", (x, torch.ones(3)))


WAITS: dict[str, Callable[[], object]] = {
    "item": lambda: float(torch.ones(1, device="cuda")),
    "cpu": lambda: there(2).cpu(),
    "tolist": lambda: there(2).tolist(),
    "from the host": lambda: torch.ones(2).to("cuda"),
    "tensor": lambda: torch.tensor([1.0], device="cuda"),
    "pageable": lambda: torch.empty(2).copy_(there(2), non_blocking=True),
    "booleans": lambda: there(2)[torch.ones(2, dtype=torch.bool, device="cuda")],
    "index of the host": lambda: there(2)[torch.tensor([1])],
    "nonzero": lambda: torch.nonzero(there(2)),
    "equal": lambda: torch.equal(there(2), there(2)),
    "checked": lambda: torch.linalg.cholesky(torch.eye(2, device="cuda")),
    "synchronize": lambda: torch.cuda.synchronize(),
    "event": lambda: torch.cuda.Event().synchronize(),
}
GOES_ON: dict[str, Callable[[], object]] = {
    "arithmetic": lambda: torch.ones(2, device="cuda").mul_(2).sum(),
    "pinned": lambda: torch.empty(2, pin_memory=True).copy_(torch.ones(2, device="cuda"), non_blocking=True),
    "from pinned": lambda: torch.ones(2, device="cuda").copy_(torch.ones(2).pin_memory(), non_blocking=True),
    "to pinned": lambda: torch.ones(2, device="cuda").to("cpu", non_blocking=True),
    "index": lambda: torch.ones(2, device="cuda")[torch.ones(1, dtype=torch.int64, device="cuda")],
    "unchecked": lambda: torch.linalg.cholesky_ex(torch.eye(2, device="cuda")),
    "query": lambda: torch.cuda.Event().query(),
}


@pytest.mark.parametrize("name", [*WAITS, *GOES_ON])
def test_waiting_is_counted(name: str) -> None:
    with standin.counted() as counts:
        (WAITS | GOES_ON)[name]()
    assert counts.total("synchronisations") == (1 if name in WAITS else 0), counts.synchronisations
    assert all("tests/standin/test_tensors.py:" in key for key in counts.synchronisations)


def test_modules_gradients_and_copies() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    x = torch.randn(5, 3)
    want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    ours = copy.deepcopy(model).to("cuda")
    got = torch.autograd.grad(ours(x.cuda()).square().sum(), list(ours.parameters()))
    for a, b in zip(got, want, strict=True):
        assert a.device == CUDA and a.is_cuda
        torch.testing.assert_close(a.cpu(), b)
    again = copy.deepcopy(ours)
    assert all(p.is_cuda and p.requires_grad for p in again.parameters())
    with pytest.raises(TypeError, match="numpy"):
        next(again.parameters()).detach().numpy()


def test_it_ends_with_its_process_and_not_before() -> None:
    """Installing it once more changes nothing; tensors under a default device are there."""
    standin.install()
    with torch.device("cuda"):
        assert torch.zeros(2).is_cuda and torch.tensor([1.0]).is_cuda
    assert not torch.zeros(2).is_cuda
