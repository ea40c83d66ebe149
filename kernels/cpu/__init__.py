"""The native CPU engine: the library built from the C++ files here, called with tensors.

Tensors in, tensors out, float32 on the CPU; every check of shapes is the caller's (strainer_fast.ops). The library is
optional: where no compiler was at hand, `library()` is None and `missing()` says why.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .loading import LEVELS, address, addresses, available, call, chosen, forced, level, library, missing

__all__ = ["LEVELS", "available", "fit", "forced", "level", "library", "missing", "sincos", "sweep"]

_int, _real, _pointer = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class Sweep(ctypes.Structure):
    """SfSweep of sweep.cpp."""

    _fields_ = [
        ("num_points", _int),
        ("num_signals", _int),
        ("channels", _int),
        ("num_layers", _int),
        ("num_shared", _int),
        ("widths", _pointer),
        ("weights", _pointer),
        ("biases", _pointer),
        ("omegas", _pointer),
        ("points", _pointer),
        ("values", _pointer),
        ("value_strides", _int * 3),
        ("point_weights", _pointer),
        ("point_weight_strides", _int * 2),
        ("scale", _pointer),
        ("dweights", _pointer),
        ("dbiases", _pointer),
        ("dpoints", _pointer),
        ("losses", _pointer),
        ("tile", _int),
        ("threads", _int),
        ("kernels", ctypes.c_char_p),
    ]


class Fit(ctypes.Structure):
    """SfFit of fit.cpp."""

    _fields_ = [
        ("num_points", _int),
        ("num_signals", _int),
        ("channels", _int),
        ("num_layers", _int),
        ("widths", _pointer),
        ("omegas", _pointer),
        ("points", _pointer),
        ("values", _pointer),
        ("parameters", _pointer),
        ("exp_avg", _pointer),
        ("exp_avg_sq", _pointer),
        ("frozen", _int),
        ("num_rows", _int),
        ("rows", _pointer),
        ("until", _int),
        ("budget", _int),
        ("learning_rates", _pointer),
        ("beta1", _real),
        ("beta2", _real),
        ("eps", _real),
        ("target_mse", _pointer),
        ("check_every", _int),
        ("guard", _real),
        ("step", _pointer),
        ("adam_step", _pointer),
        ("scale", _pointer),
        ("best_mse", _pointer),
        ("best", _pointer),
        ("rollbacks", _pointer),
        ("mse", _pointer),
        ("measured", _pointer),
        ("reason", _pointer),
        ("seconds", _pointer),
        ("threads", _int),
        ("kernels", ctypes.c_char_p),
    ]


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
    widths = torch.tensor([points.shape[1], *(w.shape[-2] for w in weights)])
    each = torch.tensor(omegas)
    tensors = [addresses(list(group)) for group in (weights, biases, dweights, dbiases)]
    of_layers = [ctypes.cast(pointers, ctypes.c_void_p) for pointers in tensors]
    weighting = (0, 0) if point_weights is None else point_weights.stride()
    task = Sweep(
        points.shape[0],
        values.shape[0],
        values.shape[2],
        len(weights),
        num_shared,
        widths.data_ptr(),
        of_layers[0],
        of_layers[1],
        each.data_ptr(),
        points.data_ptr(),
        values.data_ptr(),
        (ctypes.c_int64 * 3)(*values.stride()),
        address(point_weights),
        (ctypes.c_int64 * 2)(*weighting),
        scale.data_ptr(),
        of_layers[2],
        of_layers[3],
        address(dpoints),
        losses.data_ptr(),
        tile,
        threads,
        chosen(),
    )
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
    widths = torch.tensor([points.shape[1], *(w.shape[1] for w in parameters[::2])])
    each = torch.tensor(omegas)
    tensors = [addresses(list(group)) for group in (parameters, exp_avg, exp_avg_sq, best or [None] * len(parameters))]
    stacks = [ctypes.cast(pointers, ctypes.c_void_p) for pointers in tensors]
    task = Fit(
        points.shape[0],
        *values.shape[::2],
        len(parameters) // 2,
        widths.data_ptr(),
        each.data_ptr(),
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
