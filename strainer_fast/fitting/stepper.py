"""One optimiser step of a stack of networks: loss, gradients, update, and the last weights with a finite loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import torch
from torch import Tensor

from strainer_fast.fitting.engine import CHUNK
from strainer_fast.fitting.optim import Adam, Optimiser, Rebuild, joining, rebuilt, rows, selecting
from strainer_fast.fitting.ranks import Ranks
from strainer_fast.fitting.sampling import Sampler
from strainer_fast.ops import losses_and_gradients, siren_values
from strainer_fast.ops.tiled import normalisation
from strainer_fast.ops.triton import on_device


class Stepper:
    """Steps by `ops.losses_and_gradients` and an optimiser.

    Args:
        points: [P, in]. values: [N, P, C].
        parameters: leaves, updated in place; weight and bias of each layer, stacked [N, ...] where independent.
        optimiser: with the state of these parameters.
        implementation, precision: what computes; see `make_stepper`.
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

    def look(self) -> None:
        """Bring what the host knows of the optimiser up to date: called where losses are looked at anyway."""

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


class TritonStepper(Stepper):
    """Steps by the Triton kernels on memory allocated once: no allocation and no synchronisation per step.

    On a GPU the launches of a step are recorded into CUDA graphs the second time and replayed from then on. Parameters
    and optimiser state move into flat buffers that the given tensors become views of. A step whose loss or gradient is
    not finite changes nothing; where only the gradient is not (half precision overflows), `look` says so and lowers the
    factor that gradients are scaled by inside. That factor is not part of a checkpoint.
    """

    def __init__(
        self,
        points: Tensor,
        values: Tensor,
        parameters: list[Tensor],
        omegas: Sequence[float],
        optimiser: Adam,
        implementation: str,
        precision: str,
        independent: bool,
        keep: bool,
        sampler: None = None,
    ) -> None:
        super().__init__(points, values, parameters, omegas, optimiser, implementation, precision, independent, False)
        self.optimiser: Adam
        from strainer_fast.kernels.plan import network_of
        from strainer_fast.kernels.siren import Pipeline

        network = network_of(points.shape[1], parameters, omegas, precision)
        device = points.device
        with on_device(points):
            # A table of its own, because its scales may change: `look`.
            self.pipeline = Pipeline(network, len(points), [True] * len(parameters), device=device, own_table=True)
        self.flat = self._move(parameters, lambda i, view: setattr(parameters[i], "data", view))
        self.exp_avg = self._move(optimiser.exp_avg, lambda i, view: optimiser.exp_avg.__setitem__(i, view))
        self.exp_avg_sq = self._move(optimiser.exp_avg_sq, lambda i, view: optimiser.exp_avg_sq.__setitem__(i, view))
        self.gradients, self.previous = torch.zeros_like(self.flat), self.flat.clone()
        groups = self.pipeline.groups
        self.step, self.bad, self.skipped = (torch.zeros(groups, dtype=torch.int32, device=device) for _ in range(3))
        self.learning_rate = torch.zeros(groups, device=device)
        norm, scale = normalisation(values, None, None)
        self.norm, self.scale = norm.float(), scale * self.pipeline.loss_scale
        self.lowered = 1.0  # what `look` has multiplied scale by
        self.losses = torch.zeros(len(values), device=device)
        self._skipped_before = torch.zeros(groups, dtype=torch.int32, device="cpu")
        self._evaluate, self._update = _Replayed(device), _Replayed(device)
        self.changed()

    def _move(self, tensors: Sequence[Tensor], put: Callable[[int, Tensor], object]) -> Tensor:
        """Copy tensors into a flat buffer and put views of it in their place."""
        flat = self.points.new_zeros(self.pipeline.groups, self.pipeline.length)
        for i, (view, tensor) in enumerate(zip(self.pipeline.parameters(flat), tensors, strict=True)):
            view = view if view.ndim == tensor.ndim else view[0]
            view.copy_(tensor.detach())
            put(i, view)
        return flat

    def _launch_gradients(self) -> None:
        from strainer_fast.kernels.optim import launch_reduce

        self.pipeline.launch(self.points, self.values, self.scale, self.norm, self.losses, self.bad)
        launch_reduce(self.pipeline.table, self.pipeline.partials, self.gradients, self.bad)

    def _launch_adam(self) -> None:
        from strainer_fast.kernels.optim import launch_adam, launch_advance

        pipeline, recipe = self.pipeline, self.optimiser.recipe
        launch_adam(
            pipeline.table,
            self.flat,
            self.gradients,
            self.exp_avg,
            self.exp_avg_sq,
            self.step,
            self.learning_rate,
            self.bad,
            pipeline.copies,
            pipeline.exact_copies,
            self.previous,
            beta1=recipe.betas[0],
            beta2=recipe.betas[1],
            eps=recipe.eps,
            precision=self.precision,
        )
        launch_advance(self.step, self.bad, self.skipped)

    def evaluate(self, step: int, want_gradients: bool) -> Tensor:
        """Losses of the weights as they are; gradients come with them, asked for or not."""
        with torch.no_grad(), on_device(self.points):
            self._evaluate(self._launch_gradients)
        return self.losses.clone()

    def update(self) -> None:
        """Adam's step with the gradients of the last `evaluate`."""
        optimiser = self.optimiser
        with torch.no_grad(), on_device(self.points):
            if self.ranks is not None:
                self._share([g[0] for g in self.pipeline.parameters(self.gradients)])
                self.ranks.most(self.bad)
            if optimiser.recipe.schedule != "constant" or optimiser.recipe.warmup_steps:
                rate = optimiser.learning_rate().float().view(-1)
                # From pinned memory the copy does not wait for the GPU.
                self.learning_rate.copy_(rate.pin_memory() if self.points.is_cuda else rate, non_blocking=True)
            self._update(self._launch_adam)
        # As far as the host knows: `look` takes skipped steps out of those since the restart.
        optimiser.advance()

    def last_finite(self) -> list[Tensor]:
        """Weights of the last evaluation with a finite loss, of each network."""
        finite = torch.isfinite(self.losses)
        alive = finite if self.independent else self._everywhere(finite.all()).view(1)
        flat = torch.where(alive[:, None], self.flat, self.previous)
        return [v.reshape(p.shape) for v, p in zip(self.pipeline.parameters(flat), self.parameters, strict=True)]

    def look(self) -> None:
        """Step counts to the host; where gradients overflowed, a smaller scale and a warning."""
        self.optimiser.step.copy_(self.step.cpu().view(self.optimiser.step.shape))
        skipped = self.skipped.cpu().clone()
        overflowed = (skipped > self._skipped_before) & torch.isfinite(self.losses).view(len(skipped), -1).all(1).cpu()
        self._skipped_before = skipped
        if not overflowed.any():
            return
        how = "They will not move until that changes: lower the learning rate."
        if self.precision == "fp16":
            self.scale /= 16
            self.lowered /= 16
            self.pipeline.table.scales[:, 0] *= 16
            how = "Continuing with a smaller loss scale; if this comes again, use precision='tf32' or 'fp32'."
        warnings.warn(
            f"gradients overflowed in {self.precision} and {int(overflowed.sum())} networks skipped steps. {how}",
            stacklevel=3,
        )

    def changed(self) -> None:
        """Step counts, learning rates and copies of the weights from what was changed outside."""
        from strainer_fast.kernels.optim import launch_copies

        self.step.copy_(self.optimiser.step.view(-1))
        self.learning_rate.copy_(self.optimiser.learning_rate().view(-1))
        with on_device(self.points):
            copies = self.pipeline.copies, self.pipeline.exact_copies
            launch_copies(self.pipeline.table, self.flat, *copies, precision=self.precision)

    def _rebuilt(self, how: Rebuild, *others: Self) -> Self:
        new = super()._rebuilt(how, *others)
        stacks = (self, *others)
        for stack in others:  # one factor for all gradients of a table
            stack.scale *= self.lowered / stack.lowered
        for name in ("gradients", "bad", "losses", "previous", "scale"):
            getattr(new, name).copy_(how(*(getattr(s, name) for s in stacks)))
        new.pipeline.table.scales.copy_(self.pipeline.table.scales)
        new.lowered = self.lowered
        return new

    def select(self, index: Tensor) -> Self:
        """The same for these networks only."""
        self.look()
        return super().select(index)

    def join(self, other: Self) -> Self:
        """See Stepper."""
        self.look()
        other.look()
        return super().join(other)


class _Replayed:
    """Launches that are the same every time: run as they are first, recorded the second time, then replayed.

    It does not keep the launches: with a method of its owner it would keep the owner's memory alive.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.calls = device, 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, launches: Callable[[], None]) -> None:
        self.calls += 1
        if self.device.type == "cuda" and self.calls == 2:
            self.graph = self._record(launches)
        if self.graph is None:
            launches()
        else:
            self.graph.replay()

    def _record(self, launches: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        # A stream of this device: PyTorch's own for recording belongs to the first device that recorded. Other threads
        # may go on allocating meanwhile.
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                launches()
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # which a failed recording leaves changed
            warnings.warn(f"no CUDA graph, so every step is launched kernel by kernel: {error}", stacklevel=4)
            return None
        return graph


def make_stepper(
    points: Tensor,  # [P, in]
    values: Tensor,  # [N, P, C]
    parameters: list[Tensor],
    omegas: Sequence[float],
    optimiser: Optimiser,
    *,
    implementation: str,
    precision: str,
    independent: bool,
    keep: bool,
    sampler: Sampler | None = None,
) -> Stepper:
    """What runs steps by an implementation of `ops.dispatch.IMPLEMENTATIONS`; arguments as of Stepper."""
    if implementation == "triton" and isinstance(optimiser, Adam) and sampler is None:
        return TritonStepper(
            points, values, parameters, omegas, optimiser, implementation, precision, independent, keep
        )
    return Stepper(points, values, parameters, omegas, optimiser, implementation, precision, independent, keep, sampler)
