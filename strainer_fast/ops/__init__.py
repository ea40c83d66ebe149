"""Operations and the choice of what runs them."""

from strainer_fast.ops.dispatch import Choice, choose, choose_device, explain

__all__ = ["Choice", "choose", "choose_device", "explain"]
