"""Which implementation is taken where there are Triton kernels, and what is said where they cannot run."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import strainer_fast as sf
from strainer_fast.ops import choose, dispatch
from strainer_fast.ops.dispatch import resolve_precision, triton_missing

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of compute capability 9.0, as far as the choice can see."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(dispatch, "_driver_problem", lambda: None)


def test_auto_takes_triton_on_a_gpu_only(gpu: None) -> None:
    assert choose("auto", CUDA).name == "triton"
    assert choose("auto", CPU).name in ("native", "tiled")
    assert choose("triton", CPU).name == "triton"  # the interpreter is loaded here


def test_precision_by_default(gpu: None) -> None:
    assert resolve_precision("auto", "triton", CUDA) == "fp16"
    assert resolve_precision("auto", "triton", CPU) == "fp32"
    assert resolve_precision("auto", "native", CPU) == "fp32"
    assert resolve_precision("bf16", "triton", CUDA) == "bf16"
    assert resolve_precision("auto", "triton", CUDA, can_skip=False) == "fp32"


def test_precision_by_default_where_results_must_be_exact(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_precision("auto", "triton", CUDA, exact=True) == "tf32x3"
    with monkeypatch.context() as other:  # a chip whose matrix unit is no match for three products
        other.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
        assert resolve_precision("auto", "triton", CUDA, exact=True) == "fp32"
    for implementation, device in (("triton", CPU), ("native", CPU), ("torch", CUDA)):
        assert resolve_precision("auto", implementation, device, exact=True) == "fp32"
    assert resolve_precision("fp16", "triton", CUDA, exact=True) == "fp16"
    with pytest.raises(sf.InputError, match="'fp32' with implementation 'native', got 'tf32x3'"):
        resolve_precision("tf32x3", "native", CPU, exact=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem": "Triton is not installed"}, "Triton is not installed"),
        ({"problem": "Triton 3.1.0 is too old: 3.2 or newer is needed"}, "too old"),
        ({"driver": "Triton cannot start its driver (RuntimeError: no compiler)"}, "no compiler"),
        ({"capability": (7, 5)}, r"need compute capability 8\.0, this has 7\.5"),
    ],
    ids=["absent", "old", "driver", "chip"],
)
def test_a_gpu_without_kernels_falls_back_and_says_so_once(
    gpu: None, change: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_triton_problem", lambda: change.get("problem"))
    monkeypatch.setattr(dispatch, "_driver_problem", lambda: change.get("driver"))
    if "capability" in change:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: change["capability"])
    dispatch._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=message):
        assert choose("auto", CUDA).name == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert message.split("\\")[0].split("need")[0] in choose("auto", CUDA).reason
    with pytest.raises(sf.InputError, match=message):
        choose("triton", CUDA)


def test_versions_are_read_without_importing(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, problem in (("3.2.0", None), ("3.10.1", None), ("4.0.0", None), ("3.1.0", "too old")):
        dispatch._triton_problem.cache_clear()
        monkeypatch.setattr(dispatch, "triton_version", lambda version=version: version)
        found = dispatch._triton_problem()
        assert (found is None) if problem is None else (problem in str(found))
    dispatch._triton_problem.cache_clear()


def test_a_distribution_of_another_name_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.importlib.metadata, "packages_distributions", lambda: {"triton": ["pytorch-triton"]})
    monkeypatch.setattr(dispatch.importlib.metadata, "version", lambda name: {"pytorch-triton": "3.6.0+git1"}[name])
    assert dispatch.triton_version.__wrapped__() == "3.6.0+git1"


def test_other_devices_and_dtypes() -> None:
    assert "no Triton kernels for meta" in str(triton_missing(torch.device("meta")))
    assert "not float64" in str(triton_missing(CPU, torch.float64))


def test_cpu_tensors_without_the_interpreter_are_refused() -> None:
    code = """
import os; os.environ.pop("TRITON_INTERPRET", None)
import torch, strainer_fast as sf
try:
    sf.Siren(2, 8, 3, 1).loss(torch.zeros(4, 2), torch.zeros(4, 1), implementation="triton")
except sf.InputError as error:
    print(error)
from strainer_fast.kernels.layers import launch_forward
try:
    launch_forward(torch.zeros(4, 8), torch.zeros(1, 8, 8), None, torch.zeros(1, 4, 8), omega=1.0)
except ValueError as error:
    print(error)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root / "tests")
    first, second = done.stdout.splitlines()
    assert "CPU tensors, and Triton was not loaded in interpreter mode. Use 'auto'" in first
    assert "expected a tensor on a CUDA device, got cpu" in second


def test_launchers_refuse_what_does_not_belong_together() -> None:
    from strainer_fast.kernels.layers import launch_forward, launch_input_gradient, launch_weight_gradient

    x, w, y = torch.zeros(4, 8), torch.zeros(1, 6, 8), torch.zeros(1, 4, 6)
    for call, message in (
        (lambda: launch_forward(x.double(), w, None, y, omega=1.0), "x: expected torch.float32 or"),
        (lambda: launch_forward(x[:, :7], w, None, y, omega=1.0), r"x: expected shape \[\*, 8\], got \[4, 7\]"),
        (lambda: launch_forward(x, w, torch.zeros(1, 5), y, omega=1.0), "b: expected shape"),
        (
            lambda: launch_forward(x, w, None, y.mT.contiguous().mT, omega=1.0),
            "y: expected a tensor with a contiguous last",
        ),
        (lambda: launch_forward(x, w.to("meta"), None, y, omega=1.0), "tensors: expected one device for all"),
        (lambda: launch_forward(x, w, None, y, omega=1.0, precision="fp8"), "precision: expected one of fp32, tf32"),
        (lambda: launch_input_gradient(y[:, :3], w, torch.zeros(1, 4, 8)), "dz: expected shape"),
        (
            lambda: launch_forward(x, w.expand(65536, -1, -1), None, y.expand(65536, -1, -1), omega=1.0),
            "Split the stack",
        ),
        (lambda: launch_weight_gradient(y, x, torch.zeros(2, 1, 6, 8).mT), "dw: expected a contiguous tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
