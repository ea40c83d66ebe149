"""Operations and the choice of what runs them."""

from strainer_fast.ops.dispatch import Choice, choose, choose_device, explain
from strainer_fast.ops.one_pass import batched_siren_mse, losses_and_gradients, siren_mse, strainer_mse

__all__ = [
    "Choice",
    "batched_siren_mse",
    "choose",
    "choose_device",
    "explain",
    "losses_and_gradients",
    "siren_mse",
    "strainer_mse",
]
