"""strainer_fast: implicit neural representations, fast.

    import strainer_fast as sf
    encoder = sf.pretrain("folder of images")     # a STRAINER encoder
    result = sf.fit("new.png", encoder)           # start new signals from it
    result.render(1024)                           # any resolution

Layers (SineLinear, ...) and models (Siren, Strainer, ...) are ordinary nn.Modules for code of your own.
"""

from strainer_fast import datasets, nn, reference, signals
from strainer_fast._checks import InputError, InputTypeError
from strainer_fast._version import __version__
from strainer_fast.datasets import FittedDataset, fit_dataset
from strainer_fast.fitting import (
    FitResult,
    FittedSignal,
    Interrupted,
    Progress,
    Recipe,
    explain,
    fit,
    pretrain,
    recipe,
    render,
    render_to,
)
from strainer_fast.models import Architecture, BatchedSiren, Encoder, Siren, Strainer, load_foreign
from strainer_fast.nn import BatchedSineLinear, MultiHeadLinear, SineLinear
from strainer_fast.signals import Signal

__all__ = [
    "Architecture",
    "BatchedSineLinear",
    "BatchedSiren",
    "Encoder",
    "FitResult",
    "FittedDataset",
    "FittedSignal",
    "InputError",
    "InputTypeError",
    "Interrupted",
    "MultiHeadLinear",
    "Progress",
    "Recipe",
    "Signal",
    "SineLinear",
    "Siren",
    "Strainer",
    "__version__",
    "datasets",
    "explain",
    "fit",
    "fit_dataset",
    "load_foreign",
    "nn",
    "pretrain",
    "recipe",
    "reference",
    "render",
    "render_to",
    "signals",
]
