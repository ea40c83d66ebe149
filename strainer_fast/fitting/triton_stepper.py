"""Steps by the Triton kernels on memory allocated once, recorded into CUDA graphs."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from strainer_fast.fitting.optim import Adam, Optimiser, Rebuild
from strainer_fast.fitting.stepper import Stepper
from strainer_fast.ops.tiled import normalisation
from strainer_fast.ops.triton import on_device


class FlatStepper(Stepper):
    """What all optimisers share that step by the Triton kernels: no allocation and no synchronisation per step.

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
        optimiser: Optimiser,
        implementation: str,
        precision: str,
        independent: bool,
        keep: bool,
        sampler: None = None,
    ) -> None:
        super().__init__(points, values, parameters, omegas, optimiser, implementation, precision, independent, False)
        from strainer_fast.kernels.plan import network_of
        from strainer_fast.kernels.siren import Pipeline

        network = network_of(points.shape[1], parameters, omegas, precision)
        device = points.device
        with on_device(points):
            # A table of its own, because its scales may change: `look`.
            self.pipeline = Pipeline(network, len(points), [True] * len(parameters), device=device, own_table=True)
        self.flat = self._move(parameters, range(len(parameters)), lambda i, view: setattr(parameters[i], "data", view))
        self.gradients, self.previous = torch.zeros_like(self.flat), self.flat.clone()
        groups = self.pipeline.groups
        self.bad, self.skipped = (torch.zeros(groups, dtype=torch.int32, device=device) for _ in range(2))
        self.learning_rate = torch.zeros(groups, device=device)
        norm, scale = normalisation(values, None, None)
        self.norm, self.scale = norm.float(), scale * self.pipeline.loss_scale
        self.lowered = 1.0  # what `look` has multiplied scale by
        self.losses = torch.zeros(len(values), device=device)
        self._skipped_before = torch.zeros(groups, dtype=torch.int32, device="cpu")
        self._at_send = self.skipped, self.losses
        self._evaluate, self._update = _Replayed(device), _Replayed(device)
        self._prepare()
        self.changed()

    @abstractmethod
    def _prepare(self) -> None:
        """What the optimiser's launches need; its state moves into flat buffers."""

    def _move(self, tensors: Sequence[Tensor], which: Sequence[int], put: Callable[[int, Tensor], object]) -> Tensor:
        """Copy what belongs to parameters `which` into a flat buffer and put views of it in their place."""
        flat = self.points.new_zeros(self.pipeline.groups, self.pipeline.length)
        views = self.pipeline.parameters(flat)
        for i, (place, tensor) in enumerate(zip(which, tensors, strict=True)):
            view = views[place] if views[place].ndim == tensor.ndim else views[place][0]
            view.copy_(tensor.detach())
            put(i, view)
        return flat

    def _flattened(self, state: list[Tensor], which: Sequence[int] | None = None) -> Tensor:
        """The same for a list of the optimiser's: of all parameters, or of `which`."""
        return self._move(state, range(len(state)) if which is None else which, state.__setitem__)

    def _launch_gradients(self) -> None:
        data = self.points, self.values, self.scale, self.norm
        self.pipeline.launch(*data, self.losses, self.bad, gradients=self.gradients)

    @abstractmethod
    def _launch_update(self) -> None:
        """The optimiser's step, with the same launches every time."""

    @property
    def _told(self) -> Tensor:  # [N]
        """Losses of the weights that are in place."""
        return self.losses

    def evaluate(self, step: int, want_gradients: bool) -> Tensor:
        """Losses of the weights as they are; gradients come with them, asked for or not."""
        with torch.no_grad(), on_device(self.points):
            self._evaluate(self._launch_gradients)
        return self._told.clone()

    def update(self) -> None:
        """The optimiser's step with the gradients of the last `evaluate`."""
        optimiser = self.optimiser
        with torch.no_grad(), on_device(self.points):
            self._before_update()
            if optimiser.recipe.schedule != "constant" or optimiser.recipe.warmup_steps:
                rate = optimiser.learning_rate().float().view(-1)
                # From pinned memory the copy does not wait for the GPU.
                self.learning_rate.copy_(rate.pin_memory() if self.points.is_cuda else rate, non_blocking=True)
            self._update(self._launch_update)
        # As far as the host knows: Adam takes skipped steps out of those since the restart when it looks.
        optimiser.advance()

    def _before_update(self) -> None:
        """What is not the same in every step: what other ranks have to say."""
        if self.ranks is not None:
            self._share([g[0] for g in self.pipeline.parameters(self.gradients)])
            self.ranks.most(self.bad)

    def last_finite(self) -> list[Tensor]:
        """Weights of the last evaluation with a finite loss, of each network."""
        finite = torch.isfinite(self.losses)
        alive = finite if self.independent else self._everywhere(finite.all()).view(1)
        return self._views(torch.where(alive[:, None], self.flat, self.previous))

    @property
    def can_look_behind(self) -> bool:
        """On a GPU, where the host would have to wait."""
        return self.points.is_cuda

    def before(self) -> list[Tensor]:
        """Weights of the evaluation before the last update, of each network those of its last finite loss."""
        skipped, losses = self._at_send
        # An update that was skipped has left the weights in place; `previous` is then a step older.
        stayed = (self.skipped > skipped) & torch.isfinite(losses).view(len(skipped), -1).all(1)
        return self._views(torch.where(stayed[:, None], self.flat, self.previous))

    def _views(self, flat: Tensor) -> list[Tensor]:
        """A flat buffer in the shapes of the parameters."""
        return [v.reshape(p.shape) for v, p in zip(self.pipeline.parameters(flat), self.parameters, strict=True)]

    def watched(self) -> list[Tensor]:
        """Counts of skipped steps, and losses as the launches left them."""
        self._at_send = self.skipped.clone(), self.losses.clone()
        return list(self._at_send)

    def look(self, watched: Sequence[Tensor] | None = None) -> None:
        """Where gradients overflowed, a smaller scale and a warning."""
        skipped, losses = watched or (self.skipped.cpu().clone(), self.losses.cpu())
        overflowed = (skipped > self._skipped_before) & torch.isfinite(losses).view(len(skipped), -1).all(1)
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
        """Learning rates and copies of the weights from what was changed outside."""
        from strainer_fast.kernels.optim import launch_copies

        self.learning_rate.copy_(self.optimiser.learning_rate().view(-1))
        with on_device(self.points):
            copies = self.pipeline.copies, self.pipeline.exact_copies
            launch_copies(self.pipeline.table, self.flat, *copies, precision=self.precision)

    carried: tuple[str, ...] = ("gradients", "bad", "losses", "previous", "scale")
    """Tensors with a row per network that go along into another stack."""

    def _rebuilt(self, how: Rebuild, *others: Self) -> Self:
        new = super()._rebuilt(how, *others)
        stacks = (self, *others)
        for stack in others:  # one factor for all gradients of a table
            stack.scale *= self.lowered / stack.lowered
        for name in self.carried:
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


class TritonStepper(FlatStepper):
    """Adam's steps."""

    optimiser: Adam

    def _prepare(self) -> None:
        """Both moments in flat buffers; counts on the device."""
        optimiser = self.optimiser
        self.exp_avg, self.exp_avg_sq = self._flattened(optimiser.exp_avg), self._flattened(optimiser.exp_avg_sq)
        self.step, self.arrived = torch.zeros_like(self.bad), torch.zeros_like(self.bad)

    def _launch_update(self) -> None:
        from strainer_fast.kernels.optim import launch_adam

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
            (self.skipped, self.arrived),
            beta1=recipe.betas[0],
            beta2=recipe.betas[1],
            eps=recipe.eps,
            precision=self.precision,
        )

    def look(self, watched: Sequence[Tensor] | None = None) -> None:
        """Step counts to the host, and what every stepper looks for."""
        if watched is None:
            self.optimiser.step.copy_(self.step.cpu().view(self.optimiser.step.shape))
        super().look(watched)

    def changed(self) -> None:
        """Step counts too from what was changed outside."""
        self.step.copy_(self.optimiser.step.view(-1))
        super().changed()


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
        # Not torch.cuda.graph, which waits for the device and empties PyTorch's cache of memory; on a stream of this
        # device, because PyTorch's own for recording belongs to the first device that recorded.
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        side.wait_stream(here)
        try:
            with torch.cuda.stream(side):
                # Other threads may go on allocating meanwhile.
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    launches()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph, so every step is launched kernel by kernel: {error}", stacklevel=4)
            return None
        return graph
