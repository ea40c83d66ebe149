"""Operations and the choice of what runs them."""

from strainer_fast.ops.dispatch import Choice, choose, choose_device, explain
from strainer_fast.ops.layers import batched_sine_linear, multi_head_linear, sine_linear
from strainer_fast.ops.one_pass import batched_siren_mse, losses_and_gradients, siren_mse, siren_values, strainer_mse

__all__ = [
    "Choice",
    "batched_sine_linear",
    "batched_siren_mse",
    "choose",
    "choose_device",
    "explain",
    "losses_and_gradients",
    "multi_head_linear",
    "sine_linear",
    "siren_mse",
    "siren_values",
    "strainer_mse",
]
