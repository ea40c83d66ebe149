"""K-FAC: Gauss-Newton steps with a Kronecker-factored curvature, for the mean squared error of sine networks.

Per layer the Gauss-Newton matrix of the loss is taken as A (x) G: A the second moment of the layer's inputs (with a 1
for the bias), G that of the derivatives of the predictions by its pre-activations (Martens and Grosse 2015, section 3).
A step is then two small products a layer, (G + g I)^-1 dW (A + a I)^-1. Both factors come from a few thousand points
every few steps, so that a step costs little more than its gradient and does the work of many of Adam's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from strainer_fast import reference
from strainer_fast._random import generator_at
from strainer_fast.fitting.optim import Optimiser, Rebuild, rebuilt, rows
from strainer_fast.fitting.recipe import Recipe

MOMENTA = (0.5, 0.95)
"""Bounds of the momentum where the recipe has none: it is the share of the loss that a step leaves. That share is what
heavy-ball momentum would best be for a quadratic loss: little while steps gain decibels, much once they gain tenths."""

SMOOTHING = 0.8
"""Of that share, from step to step."""

FACTOR_POINTS = 4096
"""Points behind the factors of a refresh: 16 per unit of a layer 256 wide."""

GROWTH, CUT = 1.05, 0.5
"""The share of a Gauss-Newton step grows by the one after a step that lowers the loss, else it is cut by the other."""

STACK_ELEMENTS = 2**23
"""Most activations (points x width x networks) of one layer held for the factors."""


class Kfac(Optimiser):
    """K-FAC over stacks of networks, or one shared encoder with a head per signal.

    A step whose loss is higher than the one before, or not finite, is taken back in `settle` and tried at half the
    length: losses never rise. The recipe's learning_rate, momentum, damping, refresh_every, schedule and seed count.

    Args:
        parameters, recipe, num_signals: see Optimiser.
        points: [P, in], what the networks are fitted on.
        omegas: of each sine layer.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        recipe: Recipe,
        num_signals: int | None,
        points: Tensor,
        omegas: Sequence[float],
    ) -> None:
        super().__init__(parameters, recipe, num_signals)
        self.points, self.omegas = points, tuple(omegas)
        groups = num_signals or 1
        self.left = points.new_zeros(groups)  # share of the loss that a step leaves, smoothed
        self.rate = points.new_ones(groups)  # adapts the learning rate
        self.best = points.new_full((groups,), float("inf"))  # sum of the losses of `kept`
        self.losses: Tensor | None = None  # of `kept`, per signal; None before the first `settle`
        self.kept = [p.detach().clone() for p in parameters]
        self.kept_gradients = [torch.zeros_like(p, requires_grad=False) for p in parameters]
        self.velocity = [torch.zeros_like(p, requires_grad=False) for p in parameters]
        self.moved = False  # since the last `settle`
        self.stale = torch.ones(groups, dtype=torch.int64, device="cpu")  # 1: no factors yet
        # (A + a I)^-1 [*, in + 1, in + 1] and (G + g I)^-1 [*, out, out] of each layer; * is N where it is stacked.
        self.inverses = []
        for weight in parameters[::2]:
            *stack, out, width = weight.shape
            self.inverses.append((points.new_zeros(*stack, width + 1, width + 1), points.new_zeros(*stack, out, out)))

    def _each(self, per_group: Tensor, like: Tensor) -> Tensor:
        """A value per network so that it broadcasts over a parameter; shared ones have a single value."""
        return rows(per_group if self.step.ndim else per_group[0], like)

    @torch.no_grad()
    def settle(self, parameters: Sequence[Tensor], losses: Tensor, gradients: list[Tensor]) -> Tensor:
        """Take back steps that raised the loss; see Optimiser.settle."""
        total = losses if self.step.ndim else losses.sum().view(1)
        good = (total <= self.best) | torch.isinf(self.best)
        for g in gradients:  # half precision may overflow here alone
            finite = torch.isfinite(g)
            good = good & (finite.flatten(1).all(1) if self.step.ndim else finite.all())
        for p, kept, v in zip(parameters, self.kept, self.velocity, strict=True):
            ok = self._each(good, p)
            p.copy_(kept.copy_(torch.where(ok, p.detach(), kept)))
            v.copy_(torch.where(ok, v, torch.zeros_like(v)))
        for g, kept in zip(gradients, self.kept_gradients if gradients else (), strict=True):
            g.copy_(kept.copy_(torch.where(self._each(good, g), g, kept)))
        if self.moved:
            self.rate *= torch.where(good, GROWTH, CUT)
            left = torch.where(good & torch.isfinite(self.best), total / self.best, (~good).to(total.dtype))
            self.left.mul_(SMOOTHING).add_((1 - SMOOTHING) * left.nan_to_num(nan=1.0))
        self.moved = False
        self.best = torch.where(good, total, self.best)
        ok = good if self.step.ndim else good[0]
        self.losses = losses.clone() if self.losses is None else torch.where(ok, losses, self.losses)
        return self.losses

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """One step, in place."""
        self.refresh(parameters)
        rate = self.learning_rate().float().to(self.points.device).view(-1) * self.rate
        given = self.recipe.momentum
        momentum = self.left.clamp(*MOMENTA) if given is None else torch.full_like(self.left, given)
        channels = parameters[-1].shape[-1]
        for i, (inverse_a, inverse_g) in enumerate(self.inverses):
            # The mean over channels too is part of the loss: its Gauss-Newton matrix is 2 / C of A (x) G.
            joined = torch.cat([gradients[2 * i], gradients[2 * i + 1].unsqueeze(-1)], -1) * (channels / 2)
            direction = inverse_g @ joined @ inverse_a
            parts = (direction[..., :-1], direction[..., -1])
            for p, v, part in zip(parameters[2 * i :], self.velocity[2 * i :], parts, strict=False):
                p.sub_(v.mul_(self._each(momentum, v)).add_(self._each(rate, p) * part))
        self.advance()
        self.moved = True

    @torch.no_grad()
    def refresh(self, parameters: Sequence[Tensor]) -> None:
        """New factors for the networks whose turn it is."""
        steps = self.step.view(-1)
        due = (self.stale > 0) | (steps % self.recipe.refresh_every == 0)
        for step in sorted(set(steps[due].tolist())):  # one for all, unless networks came at different times
            self._refresh(parameters, torch.nonzero(due & (steps == step)).view(-1), step)

    def _refresh(self, parameters: Sequence[Tensor], networks: Tensor, step: int) -> None:
        """Both factors of each layer of some networks from a sample of the points, damped and inverted."""
        generator = generator_at(self.recipe.seed, step)
        number = min(len(self.points), FACTOR_POINTS)
        chosen = torch.randperm(len(self.points), generator=generator)[:number]
        outputs = parameters[-1].numel() // max(self.step.numel(), 1)
        signs = torch.randint(0, 2, (number, outputs), generator=generator) * 2.0 - 1
        points, signs = self.points[self._there(chosen)], self._there(signs)
        size = max(1, STACK_ELEMENTS // (number * max(p.shape[-1] for p in parameters)))
        for some in torch.split(networks, size):
            # All of them without an index, which would copy them.
            rows = slice(None) if len(some) == self.step.numel() else self._there(some)
            weights = [p.detach()[rows] for p in parameters] if self.step.ndim else [p.detach() for p in parameters]
            factors = _factors(points, weights, self.omegas, signs)
            flat = _damped_inverses([f for pair in factors for f in pair], self.recipe.damping)
            for inverse, new in zip((i for pair in self.inverses for i in pair), flat, strict=True):
                if self.step.ndim:
                    inverse[rows] = new
                else:  # heads of one encoder see the same inputs
                    inverse.copy_(new)
        self.stale[networks] = 0

    def _there(self, host: Tensor) -> Tensor:
        """On the device of the points; from pinned memory the copy does not wait for it."""
        return host.pin_memory().to(self.points.device, non_blocking=True) if self.points.is_cuda else host

    def state(self) -> dict[str, Tensor]:
        """Counts, rates, momentum, and the weights that losses are compared with."""
        groups = {
            "kept": self.kept,
            "kept_gradients": self.kept_gradients,
            "velocity": self.velocity,
            "inverse_a": [a for a, _ in self.inverses],
            "inverse_g": [g for _, g in self.inverses],
        }
        tensors = {f"{name}.{i}": t for name, group in groups.items() for i, t in enumerate(group)}
        return (
            super().state() | tensors | {"rate": self.rate, "best": self.best, "left": self.left, "stale": self.stale}
        )

    def _rebuild(self, how: Rebuild, *others: Self) -> None:
        super()._rebuild(how, *others)
        for name in ("rate", "best", "left", "stale", *(() if self.losses is None else ("losses",))):
            setattr(self, name, how(getattr(self, name), *(getattr(o, name) for o in others)))
        for name in ("kept", "kept_gradients", "velocity"):
            setattr(self, name, rebuilt(how, getattr(self, name), *(getattr(o, name) for o in others)))
        each = zip(self.inverses, *(o.inverses for o in others), strict=True)
        self.inverses = [(how(*(a for a, _ in pairs)), how(*(g for _, g in pairs))) for pairs in each]

    def restart(self, signal: int) -> None:
        """Forget the state of one signal and halve its learning rate."""
        super().restart(signal)
        self.best[signal] = float("inf")
        self.left[signal] = 0
        for v in self.velocity:
            v[signal] = 0


def _damped_inverses(factors: Sequence[Tensor], damping: float) -> list[Tensor]:  # of [..., n, n] each
    """(F + sqrt(damping) * (mean eigenvalue) * I)^-1 of each factor; those of one size together."""
    found: dict[int, Tensor] = {}
    for number in dict.fromkeys(f.shape[-1] for f in factors):
        members = [i for i, f in enumerate(factors) if f.shape[-1] == number]
        joined = torch.cat([factors[i].reshape(-1, number, number) for i in members])
        mean = joined.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        # A layer that nothing depends on has a factor of zeros: any step there is zero too.
        strength = torch.where(mean > 0, damping**0.5 * mean, torch.ones_like(mean))
        eye = torch.eye(number, dtype=joined.dtype, device=joined.device)
        inverses = _inverses(torch.linalg.cholesky_ex(joined + strength * eye)[0], eye)
        parts = torch.split(inverses, [factors[i].numel() // number**2 for i in members])
        found |= {i: part.view(factors[i].shape) for i, part in zip(members, parts, strict=True)}
    return [found[i] for i in range(len(factors))]


def _inverses(lower: Tensor, eye: Tensor) -> Tensor:  # [k, n, n] of L -> (L L^T)^-1
    if not lower.is_cuda:
        return torch.cholesky_inverse(lower)
    # On a GPU that goes matrix by matrix.
    half: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
    return half.mT @ half


def _factors(
    points: Tensor,  # [P, in]
    parameters: Sequence[Tensor],
    omegas: Sequence[float],
    signs: Tensor,  # [P, outputs of a network, or of all heads of a shared one]
) -> list[tuple[Tensor, Tensor]]:
    """(A, G) of each layer: [N, in + 1, in + 1] and [N, out, out], without N where a layer is shared by all networks.

    With one random sign per point and output, a single backward pass has the second moment of all of them: the
    expectation of the signs' products is the identity.
    """
    ones = points.new_ones(1)
    inputs: list[Tensor] = []
    slopes: list[Tensor] = []
    h = points
    for weight, bias, omega in zip(parameters[:-2:2], parameters[1:-2:2], omegas, strict=True):
        inputs.append(h)
        linear = reference.multi_head_linear if weight.ndim == 3 else torch.nn.functional.linear
        z = omega * linear(h, weight, bias)
        h = torch.sin(z)
        slopes.append(omega * torch.cos(z))
    inputs.append(h)

    head = parameters[-2]  # [N, C, H] or [C, H]
    networks = head.shape[0] if head.ndim == 3 else 1
    out = head.shape[-2]
    # Networks of a stack share their signs, so that none depends on its company; heads of one encoder do not.
    if signs.shape[1] == networks * out:
        signs = signs.view(-1, networks, out).transpose(0, 1)
    delta = signs @ head  # [N, P, H], or [P, H]
    gs: list[Tensor] = []
    for i in range(len(slopes) - 1, -1, -1):
        if slopes[i].ndim == 2 and delta.ndim == 3:
            delta = delta.sum(0)  # independent signs: the moment of the sum is the sum of the moments
        delta = delta * slopes[i]
        gs.append(_moment(delta))
        if i:
            delta = delta @ parameters[2 * i]
    gs.reverse()
    gs.append(torch.eye(out, dtype=points.dtype, device=points.device).expand(*h.shape[:-2], out, out))
    joined = [torch.cat([h, ones.expand(*h.shape[:-1], 1)], -1) for h in inputs]
    return [(_moment(h), g) for h, g in zip(joined, gs, strict=True)]


def _moment(x: Tensor) -> Tensor:  # [P, n] or [N, P, n] -> [n, n] or [N, n, n]
    return x.mT @ x / x.shape[-2]
