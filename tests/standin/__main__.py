"""Counts per step by recipe, or any module of this project on the stand-in.

python -m tests.standin                      the table of counts: some minutes
python -m tests.standin run MODULE [ARGUMENT ...]     as `python -m MODULE`, on the stand-in
"""

from __future__ import annotations

import runpy
import sys
import warnings

from tests import standin


def main(arguments: list[str]) -> None:
    """The command line."""
    # Triton <= 3.6 and numpy warn in its interpreter; in kernels infinities are meant.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    standin.install()
    if arguments[:1] == ["run"] and len(arguments) > 1:
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    if arguments:
        sys.exit(f"{__doc__}\nexpected nothing, or run and a module, got {' '.join(arguments)}.")
    import torch

    from tests.standin.steps import HEAD, RECIPES, counts_of, row

    torch.set_num_threads(1)
    print(HEAD, flush=True)
    for stepping in RECIPES:
        print(row(stepping.name, counts_of(stepping)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
