"""Which folders become which packages, and the native CPU engine; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, find_packages, setup

ENGINE = Path("kernels/cpu")

setup(
    packages=[
        *find_packages(include=["strainer_fast*"], exclude=["strainer_fast.kernels*", "strainer_fast.benchmarks*"]),
        # The name `kernels` belongs to another project on the index, so these folders install below ours.
        "strainer_fast.kernels",
        "strainer_fast.kernels.cpu",
        "strainer_fast.benchmarks",
        "strainer_fast.benchmarks.datasets",
        "strainer_fast.benchmarks.first_light",
        "strainer_fast.benchmarks.time_to_psnr",
    ],
    package_dir={"strainer_fast.kernels": "kernels", "strainer_fast.benchmarks": "benchmarks"},
    ext_modules=[
        # Loaded by ctypes: plain extern "C", nothing of Python's or torch's interface. Without a compiler that can
        # build it the package installs all the same, and `strainer-fast doctor` says so.
        Extension(
            "strainer_fast.kernels.cpu._engine",
            sources=sorted(str(path) for path in ENGINE.glob("*.cpp")),
            depends=sorted(str(path) for pattern in ("*.h", "*.inl") for path in ENGINE.glob(pattern)),
            language="c++",
            # Contraction is part of the algorithm: the sine's range reduction needs fused multiply-adds.
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-pthread"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ],
)
