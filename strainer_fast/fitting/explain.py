"""What would run a fit, and why, without running it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from strainer_fast._checks import bad_input, check_count
from strainer_fast.fitting import small
from strainer_fast.fitting.presets import recipe as get_recipe
from strainer_fast.fitting.recipe import Recipe
from strainer_fast.models import Architecture
from strainer_fast.ops import choose, choose_device
from strainer_fast.ops import explain as explain_step
from strainer_fast.ops.dispatch import resolve_precision
from strainer_fast.ops.triton import path_of


def explain(
    recipe: str | Recipe = "fast",
    shapes: Sequence[Sequence[int]] = (),
    *,
    architecture: Architecture | None = None,
    implementation: str = "auto",
    device: str | torch.device = "auto",
) -> str:
    """What runs here, and why: a line for training steps, and one per shape for fits of such signals.

    Args:
        recipe: of the fits, a preset's name or a Recipe.
        shapes: of signals, samples per axis and then channels: [(28, 28, 1), (178, 178, 3)].
        architecture: of the networks; the paper's by default.
        implementation, device: as `fit` takes them.

    A fit runs whole, on the native engine or on a GPU (see `strainer_fast.ops.fit_small`), unless the line names the
    recipe's field or the size that rules this out. Then it runs step by step.
    """
    recipe = get_recipe(recipe)
    network = architecture or Architecture()
    where = choose_device(device)
    lines = [f"steps: {explain_step(implementation, where)}"]
    chosen = choose(implementation, where, whole_fits=True).name
    for shape in shapes:
        if len(shape) < 2:
            raise bad_input("shapes", "samples per axis and then channels, (28, 28, 1)", shape, "Add the channels.")
        *axes, channels = (check_count("shapes", n) for n in shape)
        how = "step by step"
        if chosen == "triton":
            precision = resolve_precision(recipe.precision, chosen, where, can_skip=recipe.sampling == "full")
            sizes = len(axes), channels, network.hidden_features, network.num_layers
            how = f"step by step by Triton kernels: {path_of(*sizes, precision, where)}"
            if small.engine_of(chosen, where) == "triton":
                each = recipe, network, len(axes), channels, math.prod(axes)
                why = small.ruled_out(*each, precision=precision, device=where)
                how = f"whole fits on chip (fit_small), {precision}" if why is None else f"{how}; no whole fits: {why}"
        if chosen == "native":
            why = small.ruled_out(recipe, network, len(axes), channels, math.prod(axes))
            how = "whole fits in a core's caches (fit_small)" if why is None else f"step by step: {why}"
        lines.append(f"fits of {'x'.join(map(str, shape))}: {how}")
    return "\n".join(lines)
