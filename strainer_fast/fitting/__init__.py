"""Fitting: recipes, pre-training, fits and their results."""

from strainer_fast.fitting.explain import explain
from strainer_fast.fitting.fit import fit
from strainer_fast.fitting.interrupt import Interrupted
from strainer_fast.fitting.presets import PRESETS, recipe
from strainer_fast.fitting.pretrain import pretrain
from strainer_fast.fitting.recipe import Recipe
from strainer_fast.fitting.record import Progress
from strainer_fast.fitting.rendering import render, render_to
from strainer_fast.fitting.result import FitResult, FittedSignal

__all__ = [
    "PRESETS",
    "FitResult",
    "FittedSignal",
    "Interrupted",
    "Progress",
    "Recipe",
    "explain",
    "fit",
    "pretrain",
    "recipe",
    "render",
    "render_to",
]
