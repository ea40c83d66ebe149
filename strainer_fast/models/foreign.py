"""Networks trained elsewhere: SIREN and STRAINER checkpoints of other libraries, from their state_dict layouts.

No layout stores omega, so the caller gives it; the default is that library's own. Loaded networks compute what
the original computes, with the same operations in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from strainer_fast._checks import Omega, bad_input, check_choice
from strainer_fast.models.siren import Siren, siren_from_rows
from strainer_fast.models.strainer import Strainer

LAYOUTS = ("alpine", "vsitzmann", "siren-pytorch")

_LAST = 10**9  # where a layer without a number sorts

_CHAIN = {
    "alpine": re.compile(r"model\.(?P<layer>\d+)\.(?P<kind>weight|bias)"),
    # SingleBVPNet, FCBlock and the notebook's Siren, in this order.
    "vsitzmann": re.compile(r"(?:net\.)+(?P<layer>\d+)\.(?:0\.|linear\.)?(?P<kind>weight|bias)"),
    # SirenNet of 0.1.x (layers.N) and of 0.0.x (net.N), bare or inside a SirenWrapper (net.).
    "siren-pytorch": re.compile(r"(?:net\.)?(?:(?:layers|net)\.(?P<layer>\d+)|last_layer)\.(?P<kind>weight|bias)"),
}
_ALPINE_STRAINER = re.compile(r"(?P<part>encoder|decoder\.(?P<head>\d+))\.(?P<layer>\d+)\.(?P<kind>weight|bias)")


def load_foreign(
    source: Mapping[str, Tensor] | str | Path,
    layout: str,
    omega: Omega | None = None,
) -> Siren | Strainer:
    """Load a SIREN or STRAINER checkpoint of another library.

    Args:
        source: a state_dict, or the path of a file that `torch.load(weights_only=True)` reads as one.
        layout: "alpine" (its Siren gives a Siren, its Strainer a Strainer), "vsitzmann" (vsitzmann/siren: modules.py
            and the notebook) or "siren-pytorch" (lucidrains/siren-pytorch: SirenNet, SirenWrapper without modulator).
        omega: a number or one per sine layer. None takes the library's default: 30 for alpine and vsitzmann; for
            siren-pytorch 30 in the first layer (w0_initial) and 1 in the others (w0).

    Returns:
        A network with the checkpoint's dtype. Layers without bias get a bias of zero. The last layer is taken to
        be linear, as each library has it by default. alpine's Strainer returns [P, N, C]; ours [N, P, C].

    Raises:
        InputError for an unknown layout, a parameter that does not belong to it, or shapes that do not chain.
    """
    check_choice("layout", layout, LAYOUTS)
    state = _read(source)
    if layout == "alpine" and any(name.startswith("encoder.") for name in state):
        return _alpine_strainer(state, 30.0 if omega is None else omega)
    layers = _chain(state, layout)
    if omega is None:
        omega = 30.0 if layout != "siren-pytorch" else (30.0, *[1.0] * (len(layers) - 2))[: len(layers) - 1]
    return siren_from_rows(_named(layers), omega)


def _read(source: Mapping[str, Tensor] | str | Path) -> Mapping[str, Tensor]:
    if isinstance(source, str | Path):
        try:
            source = torch.load(source, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:  # torch.load reports unusable files by errors of every kind
            fix = "Save module.state_dict() with torch.save."
            raise bad_input(str(source), "a state_dict that loads with weights_only=True", error, fix) from None
    if not isinstance(source, Mapping) or not all(isinstance(v, Tensor) for v in source.values()):
        raise bad_input(
            "checkpoint",
            "a flat state_dict (name -> tensor)",
            type(source).__name__,
            "Pass the dict that module.state_dict() returned.",
        )
    return source


def _chain(state: Mapping[str, Tensor], layout: str) -> list[dict[str, Tensor]]:
    """The layers of one chain in order, each {"weight": ..., "bias": ...}, with their shapes checked."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = _CHAIN[layout].fullmatch(name)
        if match is None:
            raise bad_input(
                f"{layout} checkpoint",
                "only parameters of its SIREN",
                repr(name),
                f"Choose the layout that wrote the file: {', '.join(LAYOUTS)}.",
            )
        index = _LAST if match["layer"] is None else int(match["layer"])
        found.setdefault(index, {})[match["kind"]] = tensor.detach()
    layers = [found[index] for index in sorted(found)]
    # alpine's lists hold a parameterless sine after each linear layer.
    step = 2 if layout == "alpine" else 1
    numbers = [index for index in sorted(found) if index != _LAST]
    if numbers != list(range(0, step * len(numbers), step)):
        raise bad_input(f"{layout} checkpoint", "layers without a gap", numbers, "The checkpoint is not complete.")
    if not layers or any("weight" not in layer or layer["weight"].ndim != 2 for layer in layers):
        raise bad_input(f"{layout} checkpoint", "a weight [out, in] per layer", sorted(state), "Check the layout.")
    for layer in layers:
        layer.setdefault("bias", layer["weight"].new_zeros(layer["weight"].shape[0]))
    widths = {size for layer in layers[:-1] for size in layer["weight"].shape[:1]}
    chained = all(a["weight"].shape[0] == b["weight"].shape[1] for a, b in pairwise(layers))
    if not chained or len(widths) > 1:
        shapes = [tuple(layer["weight"].shape) for layer in layers]
        raise bad_input(f"{layout} checkpoint", "hidden layers of one width", shapes, "Other shapes cannot be loaded.")
    return layers


def _named(layers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = [*(f"layers.{i}" for i in range(len(layers) - 1)), "head"]
    return {f"{name}.{kind}": t for name, layer in zip(names, layers, strict=True) for kind, t in layer.items()}


def _alpine_strainer(state: Mapping[str, Tensor], omega: Omega) -> Strainer:
    heads = sorted({int(m["head"]) for m in map(_ALPINE_STRAINER.fullmatch, state) if m and m["head"]})
    encoder_state = {name: t for name, t in state.items() if name.startswith("encoder.")}
    if heads != list(range(len(heads))) or not heads:
        raise bad_input("alpine checkpoint", "decoders 0, 1, ...", heads, "Save the whole Strainer's state_dict.")
    networks = []
    # Encoder indices come first, so a decoder's are shifted behind them to make one chain.
    shift = 2 + max(int(_match_strainer(name)["layer"]) for name in encoder_state)
    for head in heads:
        chain = {
            f"model.{int(m['layer']) + (shift if m['head'] else 0)}.{m['kind']}": state[name]
            for name in state
            if (m := _match_strainer(name)) and m["head"] in (None, str(head))
        }
        networks.append(_chain(chain, "alpine"))
    first, last = networks[0][0]["weight"], networks[0][-1]["weight"]
    num_layers, num_shared = len(networks[0]), sum(name.endswith(".weight") for name in encoder_state)
    model = Strainer(
        first.shape[1], first.shape[0], num_layers, last.shape[0], num_shared, len(heads), omega, dtype=first.dtype
    )
    rows = [_named(layers) for layers in networks]
    stacks = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    model.encoder.load_state_dict({name: stacks[name][0] for name in model.encoder.state_dict()})
    for i, layer in enumerate(model.decoder):
        layer.load_state_dict({kind: stacks[f"layers.{num_shared + i}.{kind}"] for kind in ("weight", "bias")})
    model.head.load_state_dict({kind: stacks[f"head.{kind}"] for kind in ("weight", "bias")})
    return model


def _match_strainer(name: str) -> re.Match[str]:
    match = _ALPINE_STRAINER.fullmatch(name)
    if match is None:
        raise bad_input("alpine checkpoint", "encoder.* and decoder.* parameters", repr(name), "Check the layout.")
    return match
