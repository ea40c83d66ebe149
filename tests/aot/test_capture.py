"""What is compiled ahead of time is what a GPU would run; launches are recorded, and bad use is refused."""

import json

import pytest

SETUP = """
import json
import torch
from strainer_fast.kernels.capture import capture, table
from strainer_fast.kernels.cases import CASES, step
from strainer_fast.kernels.chip import CHIPS
from strainer_fast.kernels.tiles import TABLE
from strainer_fast.kernels.trig import _sincos_kernel, launch_sincos
chip = CHIPS["sm_90"]
"""


def test_the_interpreter_is_refused(run_python) -> None:
    done = run_python("-c", SETUP + "with capture(chip): pass", interpret=True)
    assert done.returncode == 1
    assert "RuntimeError: capture: expected Triton's compiler, got its interpreter" in done.stderr
    done = run_python("-m", "strainer_fast.kernels.aot", "--chip", "sm_90", interpret=True)
    assert done.returncode == 2
    assert "without TRITON_INTERPRET" in done.stderr and not done.stdout


def test_only_meta_tensors_are_taken(run_python) -> None:
    code = """
x = torch.empty(8, device="cpu")
with capture(chip):
    _sincos_kernel[(1,)](x, x, x, 8, BLOCK=16, PRECISION="fp32", TARGET="cuda")
"""
    done = run_python("-c", SETUP + code)
    assert "TypeError: _sincos_kernel: x_ptr: expected a tensor of device meta, got one of cpu" in done.stderr


def test_launching_is_restored_after_an_error(run_python) -> None:
    code = """
from triton.runtime.jit import JITFunction
from strainer_fast.kernels import configs
before = JITFunction.run
for context in (capture(chip), table([])):
    try:
        with context:
            assert not configs.TABLE or JITFunction.run is not before
            raise KeyError
    except KeyError:
        pass
assert JITFunction.run is before and configs.TABLE is TABLE
print("restored")
"""
    assert run_python("-c", SETUP + code).stdout == "restored\n"


def test_what_is_recorded(run_python) -> None:
    code = """
with capture(chip) as launches:
    x = torch.empty(1003)
    launch_sincos(x[3:], torch.empty(1000), torch.empty(1000))
    _sincos_kernel[lambda has: (has["BLOCK"], 2)](x, x, x, 1, BLOCK=16, PRECISION="fp32", TARGET="cuda", num_warps=8)
first, second = (launch.specialise() for launch in launches)
print(json.dumps([launches[0].grid, launches[1].grid, first.signature, second.signature, second.options,
                  [first.attributes[i,] for i in range(4)], second.constants[3,], len(launches[1].tensors)]))
"""
    grids = [[1], [16, 2]]
    types = {"x_ptr": "*fp32", "sin_ptr": "*fp32", "cos_ptr": "*fp32", "size": "i32"}
    constants = {"BLOCK": "constexpr", "PRECISION": "constexpr", "TARGET": "constexpr"}
    divisible = [["tt.divisibility", 16]]
    done = run_python("-c", SETUP + code)
    assert json.loads(done.stdout) == [
        *grids,
        types | constants,
        types | constants | {"size": "constexpr"},  # a size of 1 is part of the program
        {"num_warps": 8},
        [[], divisible, divisible, []],  # x starts 12 bytes into its memory, 1000 is no multiple of 16
        1,
        1,
    ], done.stderr


def test_specialisation_is_what_triton_makes_of_a_launch(run_python) -> None:
    code = """
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
backend, seen = make_backend(GPUTarget("cuda", 90, 32)), 0
for precision in ("fp32", "tf32", "fp16"):
    with capture(chip) as launches:
        step(precision)
    for launch in launches:
        function, ours = launch.function, launch.specialise()
        binder = create_function_from_signature(function.signature, function.params, backend)
        bound, special, options = binder(**launch.arguments, **launch.options)
        _, signature, constants, attributes = function._pack_args(backend, launch.options, bound, special, options)
        assert signature == ours.signature, (launch.name, signature, ours.signature)
        assert constants == ours.constants, (launch.name, constants, ours.constants)
        assert {k: v for k, v in attributes.items() if v} == {k: v for k, v in ours.attributes.items() if v}
        seen += 1
print(seen)
"""
    done = run_python("-c", SETUP + code)
    if "ImportError" in done.stderr or "_pack_args" in done.stderr:
        pytest.skip("this Triton binds arguments in another way")
    assert done.stdout and int(done.stdout) > 30, done.stderr


def test_every_row_is_compiled_with_its_own_tiles(run_python) -> None:
    code = """
from strainer_fast.kernels.cases import ROW_CASES
from strainer_fast.kernels.configs import generation
wrong, seen = [], set()
for chip in CHIPS.values():
    for case in CASES:
        if case.row is None or case.generation != generation(chip):
            continue
        with capture(chip) as (launches):
            case.run(case.precisions[0])
        (launch,), tiles = launches, case.row.tiles
        has = launch.constants
        sizes = [has["BLOCK_P"], has["BLOCK_O"], has["BLOCK_K"]] if "BLOCK_O" in has else [has["BLOCK_P"]]
        want = [tiles.points, tiles.outputs, tiles.inputs][: len(sizes)]
        if [*sizes, launch.options["num_warps"], launch.options["num_stages"]] != [*want, tiles.warps, tiles.stages]:
            wrong.append(case.name)
        seen.add(case.row)
print(json.dumps([wrong, [repr(r) for r in TABLE if r.generation != "interpreter" and r not in seen]]))
"""
    done = run_python("-c", SETUP + code)
    assert done.stdout, done.stderr
    wrong, missing = json.loads(done.stdout)
    assert wrong == []
    assert missing == []  # a kernel with rows needs a function in cases.ROW_CASES
