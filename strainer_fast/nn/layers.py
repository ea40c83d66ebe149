"""Sine and multi-head layers as ordinary nn.Modules: parameters named weight and bias, no hidden state.

They work in any training loop: state_dict, deepcopy, pickle, LBFGS, torch.func, torch.compile, higher derivatives,
autocast (the sine's argument stays float32). What runs them is chosen by `implementation`, see strainer_fast.ops.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from strainer_fast._checks import bad_input, check_count, check_real
from strainer_fast.nn.init import init_linear_
from strainer_fast.ops.layers import batched_sine_linear, check_layer_choice, multi_head_linear, sine_linear


class _Layer(nn.Module):
    """Parameters of one layer, plain ([out, in]) or stacked ([N, out, in]), drawn by SIREN's rules."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    # Also for modules pickled before these existed.
    implementation = "auto"
    precision = "fp32"

    def __init__(
        self,
        stack: tuple[int, ...],
        in_features: int,
        out_features: int,
        bias: bool,
        omega: float,
        is_first: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        implementation: str,
        precision: str,
    ) -> None:
        super().__init__()
        check_layer_choice(implementation, precision)
        self.implementation, self.precision = implementation, precision
        self.in_features = check_count("in_features", in_features)
        self.out_features = check_count("out_features", out_features)
        self.omega = check_real("omega", omega, above=0)
        self.is_first = is_first
        self.weight = nn.Parameter(torch.empty(*stack, out_features, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(*stack, out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new parameters; pass a CPU generator to make them reproducible."""
        init_linear_(self.weight, self.bias, self.omega, self.is_first, generator)

    def _check_input(self, x: Tensor, stacked: bool) -> None:
        """[..., in] for a plain layer; [P, in] or [N, P, in] for a stacked one."""
        ok = x.ndim >= 1 and x.shape[-1] == self.in_features
        expected = f"[..., {self.in_features}]"
        if stacked:
            num = self.weight.shape[0]
            ok = ok and (x.ndim == 2 or (x.ndim == 3 and x.shape[0] == num))
            expected = f"[P, {self.in_features}] or [{num}, P, {self.in_features}]"
        if not ok:
            raise bad_input(
                f"input of {type(self).__name__}",
                f"shape {expected}",
                list(x.shape),
                "The last axis holds the features.",
            )

    def extra_repr(self) -> str:
        """What print(module) shows."""
        stack = "".join(f"{n}, " for n in self.weight.shape[:-2])
        return (
            f"{stack}{self.in_features}, {self.out_features}, bias={self.bias is not None}{self._sine_repr()}"
            + "".join(
                f", {name}={getattr(self, name)}"
                for name, default in (("implementation", "auto"), ("precision", "fp32"))
                if getattr(self, name) != default
            )
        )

    def _sine_repr(self) -> str:
        return ""


class SineLinear(_Layer):
    """y = sin(omega * (x W^T + b)): a drop-in for nn.Linear followed by SIREN's sine.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        bias: learn an additive bias (scaled by omega like the product).
        omega: frequency scale in radians per unit; part of the layer, not of the state_dict.
        is_first: use the first layer's initialisation, U(+-1/in), instead of U(+-sqrt(6/in)/omega).
        device, dtype: of the parameters.
        implementation: "triton" (kernels for a GPU), "torch" (plain PyTorch) or "auto": triton where it can run.
        precision: what the Triton kernels may round operands of products to: "fp32", "tf32x3" (three products of tf32
            for one, right to 2^-21), "tf32", "fp16" or "bf16".

    Shapes: x [..., in] -> [..., out]. Values in [-1, 1].

    Raises InputError for sizes below 1, an omega that is not positive, an unknown implementation or precision, an input
    of another last axis, and for "triton" where it cannot run.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        omega: float = 30.0,
        is_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        implementation: str = "auto",
        precision: str = "fp32",
    ) -> None:
        super().__init__((), in_features, out_features, bias, omega, is_first, device, dtype, implementation, precision)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        self._check_input(x, stacked=False)
        how = {"implementation": self.implementation, "precision": self.precision}
        return sine_linear(x, self.weight, self.bias, self.omega, **how)

    def _sine_repr(self) -> str:
        return f", omega={self.omega:g}, is_first={self.is_first}"


class BatchedSineLinear(_Layer):
    """N independent sine layers of one shape in one product.

    Args as in SineLinear, after `num_signals` (N).

    Shapes: x [P, in], shared by all N, or [N, P, in] -> [N, P, out].
    """

    def __init__(
        self,
        num_signals: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        omega: float = 30.0,
        is_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        implementation: str = "auto",
        precision: str = "fp32",
    ) -> None:
        stack = (check_count("num_signals", num_signals),)
        super().__init__(
            stack, in_features, out_features, bias, omega, is_first, device, dtype, implementation, precision
        )

    def forward(self, x: Tensor) -> Tensor:
        """[P, in] or [N, P, in] -> [N, P, out]"""
        self._check_input(x, stacked=True)
        how = {"implementation": self.implementation, "precision": self.precision}
        return batched_sine_linear(x, self.weight, self.bias, self.omega, **how)

    def _sine_repr(self) -> str:
        return f", omega={self.omega:g}, is_first={self.is_first}"


class MultiHeadLinear(_Layer):
    """N linear heads in one product: y_n = x W_n^T + b_n.

    Args:
        num_heads: N, one head per signal.
        in_features, out_features, bias, device, dtype: as in nn.Linear.
        implementation, precision: as in SineLinear.
        omega: only sets the spread of the initial weights, U(+-sqrt(6/in)/omega), as SIREN's last layer has it.

    Shapes: x [P, in], shared by all heads, or [N, P, in] -> [N, P, out].
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        omega: float = 30.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        implementation: str = "auto",
        precision: str = "fp32",
    ) -> None:
        stack = (check_count("num_heads", num_heads),)
        super().__init__(stack, in_features, out_features, bias, omega, False, device, dtype, implementation, precision)

    def forward(self, x: Tensor) -> Tensor:
        """[P, in] or [N, P, in] -> [N, P, out]"""
        self._check_input(x, stacked=True)
        how = {"implementation": self.implementation, "precision": self.precision}
        return multi_head_linear(x, self.weight, self.bias, **how)
