"""The native CPU engine: the library built from the C++ files here, called with tensors.

Tensors in, tensors out, float32 on the CPU; every check of shapes is the caller's (strainer_fast.ops). The library is
optional: where no compiler was at hand, `library()` is None and `missing()` says why.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from .interface import Fit, Sweep
from .loading import (
    LEVELS,
    address,
    addresses,
    available,
    call,
    chosen,
    forced,
    level,
    library,
    missing,
    pointer,
    reals,
    sizes,
)

__all__ = ["LEVELS", "available", "fit", "forced", "level", "library", "missing", "sincos", "sweep", "values"]


def sweep(
    points: Tensor,  # [P, in]
    values: Tensor,  # [N, P, C], any strides
    weights: Sequence[Tensor],  # [out, in], from `num_shared` on [N, out, in]
    biases: Sequence[Tensor],
    omegas: Sequence[float],  # one per layer; the head's is 1
    num_shared: int,
    scale: Tensor,  # [N]
    point_weights: Tensor | None,  # [N, P], any strides
    *,
    losses: Tensor,  # [N] float64, out: sums of squares
    dweights: Sequence[Tensor | None],  # out, shaped as the weights
    dbiases: Sequence[Tensor | None],  # out
    dpoints: Tensor | None,  # [P, in], added to
    threads: int,
    tile: int = 0,
) -> None:
    """One training step; all but `values` and `point_weights` contiguous. The GIL is released meanwhile."""
    widths = sizes([points.shape[1], *(w.shape[-2] for w in weights)])
    each = reals(omegas)
    tensors = [addresses(group) for group in (weights, biases, dweights, dbiases)]
    of_layers = [pointer(each_layer) for each_layer in tensors]
    weighting = (0, 0) if point_weights is None else point_weights.stride()
    task = Sweep(
        points.shape[0],
        values.shape[0],
        values.shape[2],
        len(weights),
        num_shared,
        pointer(widths),
        of_layers[0],
        of_layers[1],
        pointer(each),
        points.data_ptr(),
        values.data_ptr(),
        sizes(values.stride()),
        address(point_weights),
        sizes(weighting),
        scale.data_ptr(),
        of_layers[2],
        of_layers[3],
        address(dpoints),
        losses.data_ptr(),
        None,
        tile,
        threads,
        chosen(),
    )
    call("sf_sweep", ctypes.byref(task))


def values(
    points: Tensor,  # [P, in]
    weights: Sequence[Tensor],  # [out, in], from `num_shared` on [N, out, in]
    biases: Sequence[Tensor],
    omegas: Sequence[float],  # one per layer; the head's is 1
    num_shared: int,
    *,
    out: Tensor,  # [N, P, C]
    threads: int,
) -> None:
    """What networks give at points; all contiguous. The GIL is released meanwhile."""
    widths = sizes([points.shape[1], *(w.shape[-2] for w in weights)])
    each = reals(omegas)
    unwanted: list[Tensor | None] = [None] * len(weights)
    tensors = [addresses(group) for group in (weights, biases, unwanted)]
    of_layers = [pointer(each_layer) for each_layer in tensors]
    task = Sweep(num_points=points.shape[0], num_signals=out.shape[0], channels=out.shape[2], num_layers=len(weights),
                 num_shared=num_shared, widths=pointer(widths), weights=of_layers[0], biases=of_layers[1],
                 omegas=pointer(each), points=points.data_ptr(), dweights=of_layers[2], dbiases=of_layers[2],
                 predictions=out.data_ptr(), threads=threads, kernels=chosen())  # fmt: skip
    call("sf_sweep", ctypes.byref(task))


def sincos(x: Tensor, sine: Tensor, cosine: Tensor) -> None:
    """The engine's own sine and cosine of a contiguous tensor, into two others."""
    call(
        "sf_sincos",
        chosen(),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_void_p(sine.data_ptr()),
        ctypes.c_void_p(cosine.data_ptr()),
        ctypes.c_int64(x.numel()),
    )


def fit(
    points: Tensor,  # [P, in]
    values: Tensor,  # [N, P, C]
    parameters: Sequence[Tensor],  # [N, out, in], [N, out] of each layer; updated in place, as all state here
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    best: Sequence[Tensor] | None,  # needed with a guard
    omegas: Sequence[float],  # one per layer; the head's is 1
    *,
    rows: Tensor,  # int64, the queue
    until: int,
    budget: int,
    learning_rates: Tensor,  # [budget] float32
    betas: tuple[float, float],
    eps: float,
    target_mse: Tensor,  # [N] float64, negative for none
    check_every: int,
    guard: float,  # 0 for none
    frozen: int,
    step: Tensor,  # [N] int64
    adam_step: Tensor,  # [N] int64
    scale: Tensor,  # [N] float32
    best_mse: Tensor,  # [N] float64
    rollbacks: Tensor,  # [N] int64
    mse: Tensor,  # [N, budget + 1] float32
    measured: Tensor,  # [N] int64
    reason: Tensor,  # [N] int64
    seconds: Tensor,  # [N] float64
    threads: int,
) -> None:
    """Run the networks of the queue until they stop or reach step `until`; all contiguous. Meanings: fit.cpp."""
    widths = sizes([points.shape[1], *(w.shape[1] for w in parameters[::2])])
    each = reals(omegas)
    kept: Sequence[Tensor | None] = best or [None] * len(parameters)
    tensors = [addresses(group) for group in (parameters, exp_avg, exp_avg_sq, kept)]
    stacks = [pointer(group) for group in tensors]
    task = Fit(
        points.shape[0],
        values.shape[2],
        len(parameters) // 2,
        pointer(widths),
        pointer(each),
        points.data_ptr(),
        values.data_ptr(),
        *stacks[:3],
        frozen,
        rows.numel(),
        rows.data_ptr(),
        until,
        budget,
        learning_rates.data_ptr(),
        *betas,
        eps,
        target_mse.data_ptr(),
        check_every,
        guard,
        *(t.data_ptr() for t in (step, adam_step, scale, best_mse)),
        stacks[3],
        *(t.data_ptr() for t in (rollbacks, mse, measured, reason, seconds)),
        threads,
        chosen(),
    )
    call("sf_fit", ctypes.byref(task))
