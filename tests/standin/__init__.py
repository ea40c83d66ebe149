"""A stand-in for a GPU: the whole CUDA path on a machine without one, with counts and without times.

    from tests import standin

    standin.install()  # for the rest of this process
    with standin.counted() as counts:
        sf.fit(signal, "siren", recipe, device="cuda")
    print(counts.total("synchronisations"), counts.synchronisations.most_common(3))

Tensors that say cuda:0 hold their numbers on the CPU (tensors.py), kernels run under Triton's interpreter, streams,
events and CUDA graphs keep CUDA's rules (device.py, graphs.py). What a GPU refuses raises: operands on two devices, a
kernel that is given host memory, waiting for the device while a graph is recorded, a replay of memory that was freed.
What it cannot show: speed, races between streams, limits of a chip.

It replaces parts of torch for the whole process, so it has processes of its own: `make test-standin`,
`python -m tests.standin` (the table of counts), `python -m tests.standin run MODULE ARGUMENTS`.
"""

from tests.standin.counts import Counts, counted
from tests.standin.device import install

__all__ = ["Counts", "counted", "install"]
