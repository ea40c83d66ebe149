"""The device code compiles for real GPUs, none of which need be here."""

import re
import subprocess
import sys

import pytest

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from strainer_fast.kernels.trig import _sincos_kernel

signature = {"x_ptr": "*fp32", "sin_ptr": "*fp32", "cos_ptr": "*fp32", "size": "i32", "BLOCK": "constexpr"}
aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
source = ASTSource(_sincos_kernel, signature, constexprs={(4,): 1024}, attrs=aligned)
print(triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32)).asm["ptx"])
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_straight_line_code(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = subprocess.run([sys.executable, "-c", COMPILE, str(capability)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ptx = done.stdout
    assert re.search(rf"\.target sm_{capability}", ptx)
    assert "fma.rn.f32" in ptx
    # The compiler's own precise sine would bring a table in local memory and branches.
    assert ".local" not in ptx
    assert not re.search(r"@%p\d+ bra", ptx)
