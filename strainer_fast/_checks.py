"""Errors a user can act on: what was expected, what came, what to do. Imports nothing of the package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

Omega = float | Sequence[float]
"""omega of a network: one number for every sine layer, or one number per sine layer."""


class InputError(ValueError):
    """Input that cannot be used; the message names what was expected, what came and what to do."""


class InputTypeError(InputError, TypeError):
    """Input of a type that cannot be used."""


def bad_input(what: str, expected: str, got: object, fix: str) -> InputError:
    """The package's one form of error message, for bad values."""
    return InputError(f"{what}: expected {expected}, got {got}. {fix}")


def bad_type(what: str, expected: str, got: object, fix: str) -> InputTypeError:
    """The same form for bad types; `got` is the object itself."""
    return InputTypeError(f"{what}: expected {expected}, got {type(got).__name__}. {fix}")


def check_count(what: str, value: object, minimum: int = 1, maximum: int | None = None) -> int:
    """A whole number within bounds, as an int; bool excluded."""
    bounds = f"an integer of at least {minimum}" + (f" and at most {maximum}" if maximum is not None else "")
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise bad_type(what, bounds, value, "Pass a whole number.")
    value = int(value)
    if value < minimum or (maximum is not None and value > maximum):
        raise bad_input(what, bounds, value, "Choose a number in that range.")
    return value


def check_real(what: str, value: object, *, above: float | None = None, minimum: float | None = None) -> float:
    """A finite float, optionally above or at least a bound."""
    bounds = "a finite number"
    if above is not None:
        bounds += f" above {above:g}"
    if minimum is not None:
        bounds += f" of at least {minimum:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise bad_type(what, bounds, value, "Pass a number.")
    value = float(value)
    if not math.isfinite(value) or (above is not None and value <= above) or (minimum is not None and value < minimum):
        raise bad_input(what, bounds, value, "Choose a number in that range.")
    return value


def check_choice(what: str, value: object, choices: Sequence[str], fix: str = "Choose one of these.") -> str:
    """One of a few words."""
    if not isinstance(value, str) or value not in choices:
        raise bad_input(what, "one of " + ", ".join(repr(c) for c in choices), repr(value), fix)
    return value


def omega_per_layer(omega: Omega, num_sine_layers: int) -> tuple[float, ...]:
    """Expand omega to one float per sine layer.

    Raises InputError when a sequence has another length, or a value is not finite and positive.
    """
    if isinstance(omega, str) or not isinstance(omega, Real | Sequence):
        raise bad_type("omega", "a number, or one per sine layer", omega, "For example 30.0.")
    numbers = (omega,) * num_sine_layers if isinstance(omega, Real) else tuple(omega)
    omegas = tuple(check_real("omega", o, above=0) for o in numbers)
    if len(omegas) != num_sine_layers:
        raise bad_input(
            "omega",
            f"a number, or one number for each of the {num_sine_layers} sine layers",
            f"{len(omegas)} numbers",
            "The last layer of a network is linear and has no omega.",
        )
    return omegas
