"""What a compiled kernel takes of a chip, read from the compiler's log and the machine code."""

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton

from .chip import Chip
from .configs import REGISTERS

WARPS_PER_PROCESSOR = {"sm_86": 48, "sm_89": 48, "sm_120": 48}  # 64 elsewhere
BLOCKS_PER_PROCESSOR = {"sm_86": 16, "sm_89": 24, "sm_120": 24}  # 32 elsewhere
RESERVED = 1024
"""Bytes of shared memory that the driver takes of each block."""


@dataclass(frozen=True)
class Report:
    """Of one compiled kernel."""

    kernel: str
    chip: str
    warps: int
    stages: int
    registers: int  # a thread
    spilled: int  # bytes a thread stores to local memory for want of registers
    reloaded: int  # bytes it loads from there
    stack: int  # bytes of local memory
    shared: int  # bytes a block
    blocks: int  # that fit on a multiprocessor at once
    matrix: int  # instructions of the matrix unit
    counts: dict[str, int] = field(default_factory=dict)  # instructions by class
    slow_paths: tuple[str, ...] = ()  # signs of a library's slow path
    seconds: float = 0.0  # to compile

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


CLASSES: dict[str, str] = {
    "HGMMA": r"HGMMA\b",
    "UTCMMA": r"UTC\w*MMA\b",
    "HMMA": r"HMMA\b",
    "FFMA": r"FFMA2?\b",
    "MUFU.SIN": r"MUFU\.SIN",
    "MUFU.COS": r"MUFU\.COS",
    "MUFU.other": r"MUFU\.(?!SIN|COS)",
    "LDGSTS.16": r"LDGSTS(\.\w+)*\.128\b",
    "LDGSTS.less": r"LDGSTS(?!(\.\w+)*\.128\b)",
    "TMA": r"(UTMALDG|UBLKCP)\b",
    "LDG.16": r"LDG(\.\w+)*\.128\b",
    "LDG.less": r"LDG\b(?!(\.\w+)*\.128\b)",
    "STG": r"STG\b",
    "STS": r"STS\b",
    "LDS": r"LDSM?\b",
    "LDL": r"LDL\b",
    "STL": r"STL\b",
    "BAR": r"BAR\b",
    "diverging": r"BSSY\b",
}
"""Classes of machine instructions, by the start of their names."""

AMD_CLASSES: dict[str, str] = {
    "MFMA": r"v_mfma",
    "FFMA": r"v_(pk_)?fma(c|mk|ak)?_f32",
    "STS": r"ds_write",
    "LDS": r"ds_read",
    "LDG": r"(global|buffer)_load",
    "STG": r"(global|buffer)_store",
    "scratch": r"scratch_",
    "BAR": r"s_barrier",
}

MATRIX = ("HGMMA", "UTCMMA", "HMMA", "MFMA")


def tool(name: str) -> str:
    """The path of one of the NVIDIA tools that Triton ships."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not os.access(path, os.X_OK):
        raise RuntimeError(f"{name}: expected it in {path.parent}, which this build of Triton lacks.")
    return str(path)


def disassemble(cubin: bytes) -> str:
    """Machine code as text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return subprocess.run([tool("cuobjdump"), "-sass", path], capture_output=True, text=True, check=True).stdout


def assemble_log(ptx: str) -> str:
    """ptxas on PTX once more, for what it says: only where Triton did not pass its log on."""
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target, "PTX names its target"
    names = ["ptxas", "ptxas-blackwell"]
    if int(re.sub(r"\D", "", target[1])) >= 90:
        names.reverse()
    with tempfile.TemporaryDirectory() as folder:
        source, log = Path(folder, "kernel.ptx"), ""
        source.write_text(ptx)
        for name in names:
            done = subprocess.run([tool(name), "-v", f"--gpu-name={target[1]}", source, "-o", Path(folder, "kernel")],
                                  capture_output=True, text=True, check=False)  # fmt: skip
            log = done.stderr
            if done.returncode == 0:
                return log
    raise RuntimeError(f"ptxas: {log}")


def instructions(text: str) -> list[str]:
    """Names with their modifiers, in order: of SASS as cuobjdump writes it."""
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text, re.MULTILINE)


def count(names: list[str], classes: dict[str, str]) -> dict[str, int]:
    """How many instructions of each class there are; `all` is every one."""
    found = Counter(names)
    counts = {c: sum(n for name, n in found.items() if re.match(p, name)) for c, p in classes.items()}
    return {"all": len(names) - found["NOP"], **{c: n for c, n in counts.items() if n}}


def blocks_per_processor(chip: Chip, registers: int, shared: int, warps: int) -> int:
    """How many blocks a multiprocessor of an NVIDIA chip holds at once."""
    allocated = -(-registers * 32 // 256) * 256 * warps
    return min(
        REGISTERS // max(allocated, 1),
        (chip.shared + RESERVED) // (shared + RESERVED),
        WARPS_PER_PROCESSOR.get(chip.name, 64) // warps,
        BLOCKS_PER_PROCESSOR.get(chip.name, 32),
    )


def read_nvidia(compiled: Any, log: str, chip: Chip, seconds: float) -> Report:
    """The report of a kernel compiled for an NVIDIA chip.

    Args:
        compiled: what triton.compile returns.
        log: of ptxas -v; empty where Triton kept it for itself.
        chip: the target.
        seconds: that compiling took.
    """
    ptx = compiled.asm["ptx"]
    if "registers" not in log:
        log = assemble_log(ptx)
    numbers = {
        key: int(match[1]) if (match := re.search(pattern, log)) else 0
        for key, pattern in {
            "registers": r"Used (\d+) registers",
            "stack": r"(\d+) bytes stack frame",
            "spilled": r"(\d+) bytes spill stores",
            "reloaded": r"(\d+) bytes spill loads",
        }.items()
    }
    counts = count(instructions(disassemble(compiled.asm["cubin"])), CLASSES)
    signs = {"local memory in PTX": ".local" in ptx, "table of 2/pi in PTX": "i2opi" in ptx,
             "calls in PTX": re.search(r"^\s*call", ptx, re.MULTILINE) is not None}  # fmt: skip
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    return Report(
        kernel=compiled.metadata.name,
        chip=chip.name,
        warps=warps,
        stages=compiled.metadata.num_stages,
        shared=shared,
        blocks=blocks_per_processor(chip, numbers["registers"], shared, warps),
        matrix=sum(counts.get(c, 0) for c in MATRIX),
        counts=counts,
        slow_paths=tuple(sign for sign, there in signs.items() if there),
        seconds=seconds,
        **numbers,
    )


def read_amd(compiled: Any, chip: Chip, seconds: float) -> Report:
    """The report of a kernel compiled for an AMD chip; spills are counted in registers of 4 bytes."""
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(match[1]) if match else 0

    names = re.findall(r"^\s+([a-z][a-z0-9_]+)\s", text, re.MULTILINE)
    counts = count(names, AMD_CLASSES)
    warps, shared, registers = compiled.metadata.num_warps, compiled.metadata.shared, number("vgpr_count")
    # 512 vector registers a lane and 8 waves for each of four SIMDs; waves are spread over them.
    waves = 4 * min(8, 512 // max(-(-registers // 8) * 8, 1))
    return Report(
        kernel=compiled.metadata.name,
        chip=chip.name,
        warps=warps,
        stages=compiled.metadata.num_stages,
        registers=registers,
        spilled=4 * (number("vgpr_spill_count")),
        reloaded=0,
        stack=number("private_segment_fixed_size"),
        shared=shared,
        blocks=min(waves // warps, chip.shared // max(shared, 1)),
        matrix=sum(counts.get(c, 0) for c in MATRIX),
        counts=counts,
        seconds=seconds,
    )
