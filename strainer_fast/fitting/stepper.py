"""One optimiser step of a stack of networks: loss, gradients, update, and the last weights with a finite loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor

from strainer_fast.fitting.engine import CHUNK
from strainer_fast.fitting.optim import Optimiser, Rebuild, joining, rebuilt, rows, selecting
from strainer_fast.fitting.ranks import Ranks
from strainer_fast.fitting.sampling import Sampler
from strainer_fast.ops import losses_and_gradients, siren_values


class Stepper:
    """Steps by `ops.losses_and_gradients` and an optimiser.

    Args:
        points: [P, in]. values: [N, P, C].
        parameters: leaves, updated in place; weight and bias of each layer, stacked [N, ...] where independent.
        optimiser: with the state of these parameters.
        implementation, precision: what computes; see `steppers.make_stepper`.
        independent: whether a signal whose loss is not finite concerns itself only.
        keep: whether to keep the last weights with a finite loss; else `last_finite` is the weights as they are.
        sampler: draws the points of each step; all of them by default.

    Attributes:
        on_all_points: whether the losses of the last `evaluate` are those of all points.
        ranks: the processes that share the parameters which are not stacked; None for this one alone.
    """

    ranks: Ranks | None = None

    def __init__(
        self,
        points: Tensor,
        values: Tensor,
        parameters: list[Tensor],
        omegas: Sequence[float],
        optimiser: Optimiser,
        implementation: str,
        precision: str,
        independent: bool,
        keep: bool,
        sampler: Sampler | None = None,
    ) -> None:
        self.points, self.values, self.parameters, self.omegas = points, values, parameters, omegas
        self.optimiser, self.sampler = optimiser, sampler
        self.implementation, self.precision = implementation, precision
        self.independent, self.keep = independent, keep
        self._gradients: list[Tensor] = []
        self._kept = [p.detach().clone() for p in parameters] if keep else []
        self._alive = torch.ones(len(values) if independent else (), dtype=torch.bool, device=values.device)
        self.on_all_points = True

    def evaluate(self, step: int, want_gradients: bool) -> Tensor:  # MSE [N], before the update
        """Losses of the weights as they are, and what `update` needs."""
        chosen = None if self.sampler is None else self.sampler.draw(step)
        self.on_all_points = chosen is None
        points, values = self.points, self.values
        if chosen is not None:
            points, values = points[chosen], values[:, chosen]
        losses, self._gradients = self._sweep(points, values, want_gradients)
        if chosen is None:
            with torch.no_grad():
                losses = self.optimiser.settle(self.parameters, losses, self._gradients)
        self._keep_finite(losses)
        return losses

    def _keep_finite(self, losses: Tensor) -> None:
        """Note the weights of networks whose losses [N] have been finite so far."""
        if not self.keep:
            return
        finite = torch.isfinite(losses)
        self._alive &= finite if self.independent else self._everywhere(finite.all())
        for kept, p in zip(self._kept, self.parameters, strict=True):
            torch.where(rows(self._alive, p), p.detach(), kept, out=kept)

    def _everywhere(self, flag: Tensor) -> Tensor:
        return flag if self.ranks is None else self.ranks.all_true(flag)

    def _share(self, gradients: Sequence[Tensor]) -> None:
        """Sum the gradients of shared parameters over the ranks; those of stacked ones concern a rank's own signals."""
        if self.ranks is not None:
            self.ranks.sum(gradients[: 2 * sum(weight.ndim == 2 for weight in self.parameters[::2])])

    def _sweep(self, points: Tensor, values: Tensor, want_gradients: bool) -> tuple[Tensor, list[Tensor]]:
        each = (self.implementation, points, values, self.parameters, self.omegas, want_gradients, self.precision)
        return losses_and_gradients(*each)

    def measure(self) -> Tensor:  # MSE [N]
        """Losses of the weights as they are on all points, of which the sampler learns the errors it asks for."""
        losses, _ = self._sweep(self.points, self.values, False)
        if self.sampler is not None:
            errors = None
            if self.sampler.recipe.sampling == "error":
                errors = torch.cat([(y - v).square().mean(-1) for y, v in self._predictions(0)])
            self.sampler.look(float(-10 * losses.log10()), errors)
        return losses

    def _predictions(self, row: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(predictions, values) of one network, some points at a time."""
        weights, biases = ([p.detach()[row] for p in self.parameters[i::2]] for i in (0, 1))
        for start in range(0, len(self.points), CHUNK):
            block = slice(start, start + CHUNK)
            found = siren_values(self.points[block], weights, biases, self.omegas, implementation=self.implementation)
            yield found, self.values[row, block]

    def exact(self, rows: Sequence[int]) -> list[int]:
        """Those of the networks `rows` whose values, rounded to 8 bits, equal the signal's."""

        def equal(found: Tensor, values: Tensor) -> bool:
            return torch.equal((found.clamp(0, 1) * 255).round(), (values * 255).round())

        return [row for row in rows if all(equal(*each) for each in self._predictions(row))]

    def update(self) -> None:
        """The optimiser's step with the gradients of the last `evaluate`."""
        self._share(self._gradients)
        self.optimiser.update(self.parameters, self._gradients)

    def last_finite(self) -> list[Tensor]:
        """Weights of the last evaluation with a finite loss, of each network."""
        return self._kept if self.keep else [p.detach() for p in self.parameters]

    @property
    def can_look_behind(self) -> bool:
        """Whether `before` is known: losses can then be looked at while the next step runs."""
        return False

    def before(self) -> list[Tensor]:
        """Weights of the evaluation before the last update, of each network those of its last finite loss."""
        raise NotImplementedError(f"{type(self).__name__} does not keep the weights before an update")

    def watched(self) -> list[Tensor]:
        """What `look` asks of the device: sent along with the losses."""
        return []

    def look(self, watched: Sequence[Tensor] | None = None) -> None:
        """Bring what the host knows of the optimiser up to date: called where losses are looked at.

        `watched` is what was sent along with losses before the last update, on the host; None asks the device now.
        """

    def changed(self) -> None:
        """Parameters or optimiser state were changed from outside."""

    def select(self, index: Tensor) -> Self:
        """The same for these networks only."""
        self.optimiser.select(index)
        return self._rebuilt(selecting(index))

    def join(self, other: Self) -> Self:
        """The same for these networks and, after them, those of another one on the same points.

        Both have been evaluated; an update that follows moves all.
        """
        self.optimiser.join(other.optimiser)
        return self._rebuilt(joining, other)

    def _rebuilt(self, how: Rebuild, *others: Self) -> Self:
        stacks = (self, *others)
        new = type(self)(
            self.points,
            how(*(s.values for s in stacks)),
            [p.requires_grad_() for p in rebuilt(how, *([p.detach() for p in s.parameters] for s in stacks))],
            self.omegas,
            self.optimiser,
            self.implementation,
            self.precision,
            self.independent,
            self.keep,
            self.sampler,
        )
        # For the update that belongs to the last evaluation.
        new._gradients = rebuilt(how, *(s._gradients for s in stacks))
        new._kept = rebuilt(how, *(s._kept for s in stacks))
        new._alive = how(*(s._alive for s in stacks))
        return new
