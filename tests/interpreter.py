"""Triton's interpreter as tests need it."""

from __future__ import annotations

import os
from typing import Any


def interpret() -> None:
    """Load Triton with its interpreter, which is decided once per process; numpy >= 2.4 with Triton <= 3.6 as well.

    There a scalar is an array of one element: numpy 2.4 warns when it becomes an int, as a loop's bound does, and 2.5
    refuses. Triton 3.7 asks as here.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor
    if getattr(patch, "mended", False):
        return

    def mended(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        (scope[0].set_attr if scope else setattr)(tensor, "__index__", as_int)  # older ones have no scope

    def as_int(tensor: Any) -> int:
        return int(tensor.handle.data.reshape(()))

    mended.mended = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = mended
