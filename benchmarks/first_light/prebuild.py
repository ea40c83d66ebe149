"""Triton's cache filled beforehand, without a GPU: what first light launches, compiled for an H100 (sm_90).

    python -m strainer_fast.benchmarks.first_light.prebuild [--part I/N] [--pack] [--check]

from the tree's root, with the versions of Python, PyTorch and Triton that the GPU's machine has: they, and the source
of every kernel, are part of the cache's keys. Kernels and launchers go to .triton-cache/kernels, which is re-used;
--part takes a share, for several processes; --pack makes .triton-cache/cache.tar.xz of it, which run.sh unpacks;
--check counts what a moved copy would still have to compile. Needs a C compiler for the launchers.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

FOLDER = Path(".triton-cache")

LEFT_OUT = (".ttir", ".ttgir", ".llir", ".ptx", ".source")
"""Stages of a kernel that only people read; a launch needs its cubin and its description."""


def work() -> Iterator[tuple[str, Callable[[], object]]]:
    """What the stages launch, with the sizes that decide which kernels these are; results mean nothing here."""
    import torch

    import strainer_fast as sf
    from strainer_fast._checks import InputError
    from strainer_fast.benchmarks import gpu, gpu_layers, gpu_parts
    from strainer_fast.benchmarks.cases import Case
    from strainer_fast.benchmarks.first_light import fitting, steps
    from strainer_fast.benchmarks.time_to_psnr.methods import TUNED
    from strainer_fast.ops.dispatch import PRECISIONS

    nothing = gpu_parts.Truth({}, {}, {})

    def step(case: Case, precision: str) -> None:
        problem = gpu_parts.problem_on(case, "cuda")
        stepper = gpu_parts.triton_stepper(problem, precision)
        stepper.evaluate(0, True)
        stepper.update()

    def equality(case: Case, precision: str) -> None:
        gpu.equality(case, gpu_parts.problem_on(case, "cuda"), nothing, precision)

    def fit(signals: list[sf.Signal], recipe: sf.Recipe, init: Any = "siren", width: int | None = None) -> None:
        architecture = None if width is None else fitting.SMALL[width]
        if recipe.start == "least_squares":  # which needs features, and nothing has written any
            with suppress(InputError):
                fitting.seconds_of(signals, init, recipe, architecture=architecture)
        fitting.seconds_of(signals, init, sf.recipe(recipe, start="random"), architecture=architecture)

    scan, none = fitting.scan(False), {"target_psnr": None}
    for case in {case.name: case for case in (*steps.CASES, *gpu.CASES)}.values():
        for precision in ("fp16", "fp32") if case.num_signals > 64 else PRECISIONS:
            yield f"step {case.name} {precision}", partial(step, case, precision)
    for case in gpu.CASES:
        for precision in PRECISIONS:
            yield f"equality {case.name} {precision}", partial(equality, case, precision)
    for precision in PRECISIONS:
        yield f"layers {precision}", partial(gpu_layers.parts, precision, *gpu.LAYERS[:2], 3, "cuda")
    for name, recipe in steps._recipes(False).items():
        yield f"fit {name}", partial(fit, scan, sf.recipe(recipe, steps=2))
    yield "fit paper fp32", partial(fit, scan, sf.recipe("paper", steps=2, precision="fp32"))
    yield "fit tuned", partial(fit, scan, sf.recipe("paper", steps=2, **TUNED))

    def from_encoder() -> None:
        signals = sf.signals.samples("brain-mri", size=178)[:10]
        encoder = sf.pretrain(signals, sf.recipe("fast", pretrain_steps=1), device="cuda")
        for preset in ("fast", "paper"):
            fit(scan, sf.recipe(preset, steps=2, **none), encoder)

    yield "encoder", from_encoder
    for count, width in ((64, 32), (264, 32), (64, 64)):  # larger stacks launch the same kernels
        for preset in ("paper", "small"):
            signals = fitting.photos(count, 28)
            yield f"{count} x 3x{width} {preset}", partial(fit, signals, sf.recipe(preset, steps=2), "siren", width)
    yield "64 x 3x32 fast", partial(fit, fitting.photos(64, 28), sf.recipe("fast", steps=2), "siren", 32)

    def values(precision: str) -> None:
        network = sf.Siren(2, 256, 6, 3).to("cuda")
        for count in (2**20, 4096, 3840 * 273):
            network.values(torch.empty(count, 2, device="cuda"), precision=precision)

    for precision in PRECISIONS:
        yield f"values {precision}", partial(values, precision)


def fill(part: int, parts: int) -> None:
    """Compile what is not there yet, and build the launchers."""
    cache = FOLDER / "kernels"
    cache.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(cache.resolve())
    with tempfile.TemporaryDirectory() as folder:
        # Launchers are linked with CUDA's library: by its name, which is all that is needed here.
        subprocess.run(["gcc", "-shared", "-o", f"{folder}/libcuda.so.1", "-x", "c", "/dev/null"], check=True)
        os.environ["TRITON_LIBCUDA_PATH"] = folder
        _fill(part, parts)


def _fill(part: int, parts: int) -> None:
    import_module("tests.standin").install(compiler=True)  # of the tree, not of the package
    from triton import knobs
    from triton.backends.nvidia import driver
    from triton.runtime.jit import JITFunction

    launchers = _link_once(driver)

    compiled: list[tuple[str, float]] = []
    seen: dict[str, str] = {}

    def heard(*, src: Any, times: Any, cache_hit: bool, metadata: Any, **_: object) -> None:
        seen[str(metadata.get("hash"))] = src.name
        if not cache_hit:
            compiled.append((src.name, times.total * 1e-6))

    knobs.compilation.listener = heard
    run, linked = JITFunction.run, set()

    def build(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **kwargs)
        if kernel is not None and kernel.hash not in linked:
            linked.add(kernel.hash)
            # It is in the cache, but cannot be loaded without CUDA; from Triton 3.7 on one launcher serves all kernels.
            with suppress(ImportError, AttributeError):
                driver.CudaLauncher(kernel.src, kernel.metadata)
        return kernel

    JITFunction.run = build
    with suppress(ImportError):
        driver.CudaUtils()
    begin = time.monotonic()
    for name, do in list(work())[part::parts]:
        before = len(compiled)
        try:
            do()
            failed = ""
        except Exception as error:  # what is not written decides nothing but whether this fails
            failed = f"; then {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        print(f"{time.monotonic() - begin:6.0f} s  {name}: {len(compiled) - before} compiled{failed}", flush=True)
    names = sorted(set(seen.values()))
    counts = ", ".join(f"{name} {sum(n == name for n in seen.values())}" for name in names)
    print(f"{len(seen)} kernels, {len(compiled)} compiled now in {sum(s for _, s in compiled):.0f} s, {len(launchers)} "
          f"launchers linked now: {counts}")  # fmt: skip


def _link_once(driver: Any) -> list[str]:
    """Make Triton's driver link each launcher once, which it does again for what it cannot load; names as they come."""
    from triton.runtime.build import platform_key
    from triton.runtime.cache import get_cache_manager

    link, linked = driver.compile_module_from_src, []

    def once(src: str, name: str, **how: Any) -> Any:
        file = f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        if get_cache_manager(hashlib.sha256((src + platform_key()).encode()).hexdigest()).get_file(file):
            raise ImportError("it is there")
        linked.append(name)
        return link(src=src, name=name, **how)

    driver.compile_module_from_src = once
    return linked


def pack() -> Path:
    """The cache as one file, without what only people read."""
    path = FOLDER / "cache.tar.xz"

    def kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if entry.name.endswith(LEFT_OUT) else entry

    with tarfile.open(path, "w:xz", preset=9) as archive:
        archive.add(FOLDER / "kernels", arcname=".", filter=kept)
    return path


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="0/1", metavar="I/N")
    parser.add_argument("--pack", action="store_true", help="only pack what is there")
    parser.add_argument("--check", action="store_true", help="only count what a moved copy lacks")
    options = parser.parse_args()
    if options.pack:
        path = pack()
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
        return 0
    if options.check:
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(FOLDER / "cache.tar.xz") as archive:
                archive.extractall(f"{folder}/{FOLDER}/kernels", filter="data")
            os.environ["PYTHONPATH"] = str(Path.cwd())
            (Path(folder) / "tests").symlink_to(Path.cwd() / "tests")
            return subprocess.run([sys.executable, "-m", __spec__.name], cwd=folder, check=False).returncode
    if shutil.which("gcc") is None:
        print("prebuild: expected gcc to build launchers with, found none.", file=sys.stderr)
        return 2
    fill(*map(int, options.part.split("/")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
