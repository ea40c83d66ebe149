"""The sine layer's kernels compile for real GPUs to what they are written for; none of these need be here."""

import json
import subprocess
import sys

import pytest

COMPILE = """
import json, os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from strainer_fast.kernels import sine_linear as k

capability, precision = int(sys.argv[1]), sys.argv[2]
element = {"fp16": "*fp16", "bf16": "*bf16"}.get(precision, "*fp32")
half = precision in ("fp16", "bf16")
BLOCKS = {"BLOCK_P": 128, "BLOCK_O": 128 if half else 64, "BLOCK_K": 64 if half else 32}
COMMON = {"PRECISION": precision, "INTERPRETED": False, "FEW": 0, **BLOCKS}
# Contiguous tensors, as the models have them: the innermost stride is 1.
KERNELS = {
    "forward": (
        k._forward_kernel, {"SINE": True, "SAVE": True, "HAS_BIAS": True}, ("stride_xk", "stride_wk", "stride_bo")
    ),
    "input_gradient": (k._input_gradient_kernel, {"COSINE": True}, ("stride_wk",)),
    "weight_gradient": (k._weight_gradient_kernel, {"HAS_BIAS": True}, ("stride_xk",)),
}
found = {}
for name, (kernel, constants, ones) in KERNELS.items():
    names = kernel.arg_names
    constants = {**{n: v for n, v in COMMON.items() if n in names}, **constants, **{n: 1 for n in ones}}
    def kind(n):
        if n in constants:
            return "constexpr"
        if n == "omega":
            return "fp32"
        if n.endswith("_ptr"):
            return "*fp32" if n in ("z_ptr", "dw_ptr", "db_ptr", "b_ptr") else element
        return "i32"
    signature = {n: kind(n) for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith(("*", "i"))}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    ptx = compiled.asm["ptx"]
    found[name] = {
        "shared": compiled.metadata.shared,
        "wgmma": len(re.findall(r"wgmma\\.mma_async", ptx)),
        "mma": len(re.findall(r"mma\\.sync", ptx)),
        "async16": len(re.findall(r"cp\\.async\\.cg\\.shared\\.global \\[[^]]*\\], \\[[^]]*\\], 0x10", ptx)),
        "local": ".local" in ptx,
    }
print(json.dumps(found))
"""
NO_ASYNC = {("weight_gradient", "tf32", 90)}
"""Hopper's tf32 products take both operands along K only, so these go through registers: a gap to be closed."""

SHARED = {80: 163 * 1024, 90: 227 * 1024}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_products_use_the_matrix_units(capability: int, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [sys.executable, "-c", COMPILE, str(capability), precision]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, report in json.loads(done.stdout).items():
        assert report["wgmma" if capability == 90 else "mma"] > 0, (name, report)
        assert (report["async16"] > 0) == ((name, precision, capability) not in NO_ASYNC), (name, report)
        assert report["shared"] <= SHARED[capability], (name, report)
        assert not report["local"], (name, report)  # no spill by the front end, no slow path of a library sine
