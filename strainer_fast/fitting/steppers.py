"""The steppers by what computes a step and which optimiser takes it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from strainer_fast.fitting.kfac import Kfac
from strainer_fast.fitting.muon import Muon
from strainer_fast.fitting.optim import Adam, Optimiser
from strainer_fast.fitting.sampling import Sampler
from strainer_fast.fitting.stepper import Stepper
from strainer_fast.fitting.triton_kfac import TritonKfacStepper
from strainer_fast.fitting.triton_muon import TritonMuonStepper
from strainer_fast.fitting.triton_stepper import TritonStepper


def make_stepper(
    points: Tensor,  # [P, in]
    values: Tensor,  # [N, P, C]
    parameters: list[Tensor],
    omegas: Sequence[float],
    optimiser: Optimiser,
    *,
    implementation: str,
    precision: str,
    independent: bool,
    keep: bool,
    sampler: Sampler | None = None,
) -> Stepper:
    """What runs steps by an implementation of `ops.dispatch.IMPLEMENTATIONS`; arguments as of Stepper."""
    first = points, values, parameters, omegas
    if implementation == "triton" and sampler is None:
        if isinstance(optimiser, Adam):
            return TritonStepper(*first, optimiser, implementation, precision, independent, keep)
        if isinstance(optimiser, Kfac):
            return TritonKfacStepper(*first, optimiser, implementation, precision, independent, keep)
        if isinstance(optimiser, Muon):
            return TritonMuonStepper(*first, optimiser, implementation, precision, independent, keep)
    return Stepper(*first, optimiser, implementation, precision, independent, keep, sampler)
