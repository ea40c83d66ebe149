"""Which folders become which packages; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["strainer_fast*"], exclude=["strainer_fast.kernels*"]),
        # The name `kernels` belongs to another project on the index, so the folder installs below ours.
        "strainer_fast.kernels",
    ],
    package_dir={"strainer_fast.kernels": "kernels"},
)
