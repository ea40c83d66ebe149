"""Pre-training: one encoder from N signals, resumable to the bit."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from strainer_fast._checks import InputError, bad_input
from strainer_fast._files import read_tensors, write_tensors
from strainer_fast.fitting import engine, loop
from strainer_fast.fitting.interrupt import Interrupted, deferred_interrupt
from strainer_fast.fitting.optim import Optimiser
from strainer_fast.fitting.optimisers import make_optimiser
from strainer_fast.fitting.presets import recipe as get_recipe
from strainer_fast.fitting.ranks import Ranks
from strainer_fast.fitting.recipe import Recipe
from strainer_fast.fitting.record import INTERRUPTED, Look, Progress, Record
from strainer_fast.fitting.start import resolve_scale, scale_hidden
from strainer_fast.models import Architecture, Encoder, Siren, Strainer
from strainer_fast.ops import choose, choose_device
from strainer_fast.ops.dispatch import resolve_precision
from strainer_fast.signals import Signal, as_signals
from strainer_fast.signals.grid import COORDINATE_CONVENTION
from strainer_fast.signals.load import Source
from strainer_fast.signals.signal import describe_sizes


@engine.neutral()
def pretrain(
    signals: Source | Iterable[Source],
    recipe: str | Recipe = "fast",
    *,
    architecture: Architecture | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 30.0,
    discard: bool = False,
    implementation: str = "auto",
    device: str = "auto",
    distributed: bool = False,
    on_check: Callable[[Progress], None] = lambda progress: None,
) -> Encoder:
    """Learn an encoder from N signals at once.

    STRAINER's way (arXiv 2409.09566, section 3.1): a shared encoder and one decoder per signal minimise the sum of the
    signals' mean squared errors. `recipe.pretrain_method` has others: meta-learned encoders come with one decoder,
    which fits with start="mean" begin with.

    Args:
        signals: anything `strainer_fast.signals.load` reads, all of one size and one number of channels.
        recipe: a preset's name or a Recipe; `pretrain_steps` says how long.
        architecture: sizes of the network; the paper's by default.
        checkpoint: file to keep the state in. When it exists, the run continues from it and ends with the same bits
            as an uninterrupted one (same machine, implementation and threads; on a GPU without warnings of overflows
            in fp16). It is left in place at the end.
        checkpoint_seconds: how often it is written.
        discard: begin anew, instead of raising, when the checkpoint cannot be continued because it is of another run
            or damaged.
        implementation, device: see `strainer_fast.explain`.
        distributed: share the signals among the processes of torch.distributed's default group, which all call this
            with the same arguments, each on a device of its own: every one has some signals with their heads, and
            gradients of the encoder are summed over all at each step. The result is that of one process but for
            rounding. Rank 0 writes the checkpoint, which any number of processes can continue.
        on_check: called with the Progress every `check_every` steps; its modules are those of this process's signals.

    Returns:
        The Encoder, the same on every rank, with its decoders and a record of the run. `record["stop_reason"]` is
        "budget", or "non_finite" where training diverged and the last finite weights are returned. `record["psnr"]`
        has a number per signal; meta-learning knows only the mean of its last batch after the inner steps, and repeats
        it.

    Raises:
        InputError: signals of different sizes or channels, or a checkpoint of another run; several processes with
            K-FAC or meta-learning.
        Interrupted: on Ctrl-C, after the checkpoint was written.
    """
    signals = as_signals(signals)
    recipe = get_recipe(recipe)
    training = recipe.of_pretraining()
    architecture = architecture or Architecture()
    ranks = Ranks(len(signals), distributed, recipe)
    where = choose_device(ranks.device(device))
    chosen = choose(implementation, where).name
    precision = resolve_precision(recipe.precision, chosen, where, can_skip=recipe.pretrain_method == "strainer")
    _check_uniform(signals)
    graph = "torch" if recipe.pretrain_method == "maml" else chosen  # which keeps all activations
    number = ranks.own.stop - ranks.own.start
    engine.check_memory(graph, signals[0], number, True, architecture, where)
    path = None if checkpoint is None else Path(checkpoint)

    model = Strainer(
        len(signals[0].shape),
        architecture.hidden_features,
        architecture.num_layers,
        signals[0].channels,
        architecture.num_shared_layers,
        len(signals) if recipe.pretrain_method == "strainer" else 1,
        architecture.omegas,
    )
    model.reset_parameters(torch.Generator().manual_seed(recipe.seed))
    scale = resolve_scale(training.weight_scale, signals[0].shape)
    scale_hidden(nn.ModuleList([*model.encoder.layers, *model.decoder]), scale)
    model.to(where)
    whole = [p for layer in _layers(model) for p in (layer.weight, layer.bias)]
    parameters = whole if ranks.alone else _own(whole, 2 * architecture.num_shared_layers, ranks)
    points = signals[0].points().to(where)
    optimiser = make_optimiser(parameters, training, None, points, architecture.omegas)
    settings = _settings(signals, recipe, architecture)
    surroundings = engine.environment(chosen, where, precision=precision)
    share = _Share(ranks, whole, parameters, optimiser)
    done: list[list[float]] = []
    spent = 0.0
    if path is not None and path.exists():
        try:
            done, spent = _resume(path, share, settings, surroundings)
        except InputError as error:
            if not discard:
                raise InputError(f"{error} Or delete {path} to begin anew (--overwrite).") from None

    values = torch.stack([s.samples() for s in signals[ranks.own]]).to(where)
    last_write = time.monotonic()
    begin = time.perf_counter() - spent

    def store(mse: list[list[float]]) -> None:
        if path is not None:
            _write(path, share, mse, time.perf_counter() - begin, settings, surroundings)

    def network_of(index: int) -> Siren:
        share.show(index)
        return model.siren(index if model.num_decoders > 1 else 0)

    def look(seen: Look) -> None:
        nonlocal last_write
        on_check(seen.progress(recipe.pretrain_steps, network_of))
        if path is None or seen.records[0].reason:
            return
        if ranks.any(time.monotonic() - last_write >= checkpoint_seconds, where):
            # The loss of this step is computed again after a resume.
            store([record.mse[: seen.done[0]] for record in seen.records])
            last_write = time.monotonic()

    with deferred_interrupt() as interrupted:
        final, records = loop.optimise(
            points,
            values,
            parameters,
            architecture.omegas,
            training,
            optimiser,
            ranks,
            implementation=chosen,
            precision=precision,
            mse_so_far=done,
            stop=interrupted,
            on_check=look,
        )
    if records[0].reason == INTERRUPTED:
        store([record.mse[:-1] for record in records])
        kept = f"Kept in {path}: run the same again to continue." if path else "Nothing was kept: pass checkpoint=PATH."
        raise Interrupted(f"pre-training interrupted at step {records[0].steps} of {recipe.pretrain_steps}. {kept}")
    share.put(final)
    return _encoder(model.cpu(), signals, settings, surroundings, records, time.perf_counter() - begin)


def _check_uniform(signals: list[Signal]) -> None:
    if len({s.shape for s in signals}) > 1:
        raise bad_input(
            "pre-training signals",
            "one size for all",
            describe_sizes(signals),
            "Resize them: size=(H, W), or --size HxW.",
        )
    if len({s.channels for s in signals}) > 1:
        raise bad_input(
            "pre-training signals",
            "one number of channels for all",
            describe_sizes(signals),
            "Convert them: channels=1 or 3, or --channels 1 or 3.",
        )


def _layers(model: Strainer) -> list[Any]:
    return [*model.encoder.layers, *model.decoder, model.head]


def _settings(signals: list[Signal], recipe: Recipe, architecture: Architecture) -> dict[str, Any]:
    return {
        "recipe": recipe.as_dict(),
        "architecture": architecture.as_dict(),
        "in_features": len(signals[0].shape),
        "signals": [s.name for s in signals],
        "fingerprints": engine.fingerprints(signals),
    }


class _Share:
    """This rank's part of the parameters and of the optimiser's state, and the whole of them, which a checkpoint holds.

    Args:
        ranks, optimiser: of the run.
        whole: parameters of all signals.
        parameters: those that this rank trains; the same tensors where it is alone.
    """

    def __init__(self, ranks: Ranks, whole: list[Tensor], parameters: list[Tensor], optimiser: Optimiser) -> None:
        self.ranks, self._whole, self.parameters, self.optimiser = ranks, whole, parameters, optimiser

    def state(self) -> dict[str, Tensor]:
        """This rank's tensors by name; the tensors themselves."""
        return {f"parameters.{i}": p for i, p in enumerate(self.parameters)} | self.optimiser.state()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the whole state."""
        if self.ranks.alone:
            return {name: tuple(t.shape) for name, t in self.state().items()}
        # An optimiser of all signals on no device tells what its state would be.
        nowhere = [torch.empty(p.shape, device="meta") for p in self._whole]
        everything = type(self.optimiser)(nowhere, self.optimiser.recipe, None).state()
        named = {f"parameters.{i}": p for i, p in enumerate(nowhere)} | everything
        return {name: tuple(t.shape) for name, t in named.items()}

    def gather(self) -> dict[str, Tensor]:
        """The whole state; all ranks must ask for it together."""
        shapes = self.shapes()
        return {n: t if tuple(t.shape) == shapes[n] else self.ranks.whole(t) for n, t in self.state().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put this rank's part of a whole state in place."""
        with torch.no_grad():
            for name, tensor in self.state().items():
                found = tensors[name]
                tensor.copy_(found if found.shape == tensor.shape else found[self.ranks.own])

    def show(self, signal: int) -> None:
        """Put the weights of a signal of this rank into the whole.

        Raises InputError for one of another rank.
        """
        if self.ranks.alone:
            return
        own = self.ranks.own
        if not own.start <= signal < own.stop:
            raise bad_input("signal", f"one of this process: {own.start} to {own.stop - 1}", signal, "Ask its own.")
        with torch.no_grad():
            for p, mine in zip(self._whole, self.parameters, strict=True):
                (p if p.shape == mine.shape else p[own]).copy_(mine)

    def put(self, final: list[Tensor]) -> None:
        """Put the last weights of all ranks into the whole."""
        with torch.no_grad():
            for p, mine in zip(self._whole, final, strict=True):
                p.copy_(mine if mine.shape == p.shape else self.ranks.whole(mine))


def _own(whole: list[Tensor], shared: int, ranks: Ranks) -> list[Tensor]:
    """Parameters of a rank: the shared ones, and its rows of the stacked ones, as leaves."""
    parts = [p if i < shared else p[ranks.own] for i, p in enumerate(whole)]
    return [p.detach().clone().requires_grad_() for p in parts]


def _write(
    path: Path,
    share: _Share,
    mse: list[list[float]],
    seconds: float,
    settings: dict[str, Any],
    surroundings: dict[str, Any],
) -> None:
    tensors = share.gather() | {"curves.mse": torch.tensor(mse, dtype=torch.float64)}
    metadata = {"settings": settings, "environment": surroundings, "steps_done": len(mse[0]), "seconds": seconds}
    if share.ranks.rank == 0:
        write_tensors(path, "pre-training", tensors, metadata)


def _resume(
    path: Path, share: _Share, settings: dict[str, Any], surroundings: dict[str, Any]
) -> tuple[list[list[float]], float]:
    """Put a checkpoint's state in place; returns the losses and the seconds so far."""

    def expected(document: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        fix = "Choose another output."
        engine.check_same_settings(f"unfinished run {path.name}", document["settings"], settings, fix)
        float(document["seconds"])
        return share.shapes() | {"curves.mse": (len(settings["signals"]), int(document["steps_done"]))}

    tensors, document = read_tensors(path, "pre-training", expected)
    if document["environment"] != surroundings:
        warnings.warn(
            f"resuming a run made with {document['environment']} on {surroundings}: the result will not have the same "
            "bits as that of an uninterrupted run",
            stacklevel=3,
        )
    share.load(tensors)
    mse: list[list[float]] = tensors["curves.mse"].tolist()
    return mse, float(document["seconds"])


def _encoder(
    model: Strainer,
    signals: list[Signal],
    settings: dict[str, Any],
    surroundings: dict[str, Any],
    records: list[Record],
    seconds: float,
) -> Encoder:
    encoder = copy.deepcopy(model.encoder)
    encoder.decoders = model.decoder_state()
    psnr = [float(record.curve().psnr[-1]) if record.mse else None for record in records]
    encoder.record = settings | {
        "environment": surroundings,
        "shape": list(signals[0].shape),
        "channels": signals[0].channels,
        "value_range": list(signals[0].value_range),
        "coordinates": COORDINATE_CONVENTION,
        "steps": records[0].steps,
        "seconds": seconds,
        "stop_reason": records[0].reason,
        "psnr": [p if p is None or p != float("inf") else None for p in psnr],
        "exact": [p == float("inf") for p in psnr],
    }
    return encoder
