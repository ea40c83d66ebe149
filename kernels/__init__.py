"""Triton device code and launchers: tensors in, tensors out; no autograd, no modules, nothing of the package above.

Conventions in every file here: strides in elements, coordinates in [-1, 1], omega in radians per unit.
"""

if __name__ == "kernels":
    raise ImportError(
        "this folder is installed as strainer_fast.kernels; the global name `kernels` belongs to another project. "
        "Write `from strainer_fast import kernels`, and run from a folder other than the repository's root if you "
        "wanted that project."
    )
