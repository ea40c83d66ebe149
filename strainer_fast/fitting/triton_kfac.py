"""K-FAC's steps on the Triton kernels: everything but the refresh of the factors is decided and done on the device."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from strainer_fast.fitting.kfac import CUT, GROWTH, MOMENTA, SMOOTHING, Kfac
from strainer_fast.fitting.optim import Rebuild
from strainer_fast.fitting.triton_stepper import FlatStepper


class TritonKfacStepper(FlatStepper):
    """K-FAC as `Kfac` has it, with loss and gradients by the Triton sweep and its own work in flat buffers.

    `settle` and the step are launches of kernels/kfac.py and two batched products a shape of layer, in float32 whatever
    the sweep's products are rounded to. The refresh of the factors, every `Recipe.refresh_every` steps, is `Kfac`'s.
    """

    optimiser: Kfac
    carried = (*FlatStepper.carried, "settled", "moved")

    def _prepare(self) -> None:
        """What is kept, velocity and factors, as the launches take them."""
        from strainer_fast.kernels.kfac import Joined

        optimiser, device = self.optimiser, self.points.device
        self.kept, self.velocity = self._flattened(optimiser.kept), self._flattened(optimiser.velocity)
        self.kept_gradients = self._flattened(optimiser.kept_gradients)
        self.settled = torch.full_like(self.losses, torch.nan)
        if optimiser.losses is not None:
            self.settled.copy_(optimiser.losses)
        optimiser.losses = self.settled
        self.good, self.moved = torch.zeros_like(self.bad), torch.full_like(self.bad, int(optimiser.moved))
        self.joined = Joined(self.pipeline.table, device)
        inverses = []
        for views, own in zip(zip(self.joined.inverse_a, self.joined.inverse_g, strict=True), optimiser.inverses,
                              strict=True):  # fmt: skip
            pair = [view if view.ndim == inverse.ndim else view[0] for view, inverse in zip(views, own, strict=True)]
            for view, inverse in zip(pair, own, strict=True):
                view.copy_(inverse)
            inverses.append((pair[0], pair[1]))
        optimiser.inverses = inverses

    @property
    def _told(self) -> Tensor:
        return self.settled

    def _launch_gradients(self) -> None:
        super()._launch_gradients()
        self._launch_settle()

    def _launch_settle(self) -> None:
        from strainer_fast.kernels.kfac import launch_settle

        optimiser = self.optimiser
        launch_settle(
            self.pipeline.table,
            self.joined,
            self.flat,
            self.gradients,
            self.kept,
            self.kept_gradients,
            self.velocity,
            self.losses,
            self.settled,
            self.bad,
            self.skipped,
            self.good,
            self.moved,
            optimiser.best,
            optimiser.rate,
            optimiser.left,
            growth=GROWTH,
            cut=CUT,
            smoothing=SMOOTHING,
            factor=self.values.shape[-1] / 2,  # as in Kfac.update
        )

    def _before_update(self) -> None:
        self.optimiser.refresh(self.parameters)

    def _launch_update(self) -> None:
        from strainer_fast.kernels.kfac import launch_kfac_update

        pipeline, optimiser = self.pipeline, self.optimiser
        given = optimiser.recipe.momentum
        self.joined.precondition()
        launch_kfac_update(
            pipeline.table,
            self.joined,
            self.flat,
            self.velocity,
            self.previous,
            self.learning_rate,
            optimiser.rate,
            optimiser.left,
            self.moved,
            pipeline.copies,
            pipeline.exact_copies,
            momentum=MOMENTA if given is None else (given, given),
            precision=self.precision,
        )

    def before(self) -> list[Tensor]:
        """Weights of the evaluation before the last update: what raised a loss was taken back."""
        return self._views(self.previous)

    def last_finite(self) -> list[Tensor]:
        """The weights as they are: those of a loss that is not finite were taken back."""
        return [p.detach() for p in self.parameters]

    def _rebuilt(self, how: Rebuild, *others: Self) -> Self:
        new = super()._rebuilt(how, *others)
        # For the update that belongs to the last evaluation.
        new.joined.fill(new.pipeline.parameters(new.gradients), self.values.shape[-1] / 2)
        return new
