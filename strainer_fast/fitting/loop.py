"""The loop of pre-training: N signals that share parameters and stop together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from strainer_fast.fitting.meta import MetaStepper
from strainer_fast.fitting.optim import Optimiser
from strainer_fast.fitting.ranks import Ranks
from strainer_fast.fitting.recipe import Recipe
from strainer_fast.fitting.record import BUDGET, INTERRUPTED, NON_FINITE, Look, Record
from strainer_fast.fitting.steppers import make_stepper


def optimise(
    points: Tensor,  # [P, in]
    values: Tensor,  # [N, P, C], of this rank
    parameters: list[Tensor],  # leaves; updated in place
    omegas: Sequence[float],
    recipe: Recipe,
    optimiser: Optimiser,
    ranks: Ranks,
    *,
    implementation: str,
    precision: str = "fp32",
    mse_so_far: Sequence[Sequence[float]] = (),
    stop: Callable[[], bool] = lambda: False,
    on_check: Callable[[Look], None] = lambda look: None,
) -> tuple[list[Tensor], list[Record]]:
    """Run the optimiser for the recipe's steps, or until a loss is not finite.

    Args:
        optimiser: with the state to continue from.
        ranks: the processes that take part.
        implementation, precision: what computes a step; see `strainer_fast.fitting.steppers`.
        mse_so_far: the losses of the steps already done, per signal of all ranks.
        stop: asked before every step, or every look where there are ranks; True ends the loop there.
        on_check: called at every look at the loss with what was seen, before the optimiser moves on.

    Returns:
        The last parameters with finite losses, and a record per signal of all ranks.
    """
    records = [Record(i) for i in range(ranks.number)]
    for record, losses in zip(records, mse_so_far, strict=False):
        record.mse.extend(losses)
    stepper = (make_stepper if recipe.pretrain_method == "strainer" else MetaStepper)(
        points,
        values,
        parameters,
        omegas,
        optimiser,
        implementation=implementation,
        precision=precision,
        independent=False,
        keep=True,
    )
    stepper.ranks = None if ranks.alone else ranks
    pending: list[Tensor] = []  # losses not yet seen by the host
    begin = time.perf_counter()
    for step in range(len(records[0].mse), recipe.steps + 1):
        due = step % recipe.check_every == 0 or step == recipe.steps
        # Every rank must hear of it at the same step, which costs a message.
        interrupted = ranks.any(stop(), points.device) if due or ranks.alone else False
        pending.append(stepper.evaluate(step, step < recipe.steps))
        if due or interrupted:
            seen = ranks.whole(torch.stack(pending, 1)).T.cpu().double().numpy()  # [checked steps, N]
            pending.clear()
            stepper.look()
            now = time.perf_counter() - begin
            bad = ~np.isfinite(seen).all(axis=1)
            good = int(bad.argmax()) if bad.any() else len(seen)
            with np.errstate(divide="ignore", invalid="ignore"):
                psnr = (-10 * np.log10(seen[-1])).tolist()
            reason = BUDGET if step == recipe.steps else INTERRUPTED if interrupted else ""
            for row, record in enumerate(records):
                record.mse.extend(seen[:good, row])
                record.clock.append((step, now))
                if good < len(seen) or reason:
                    record.stop(NON_FINITE if good < len(seen) else reason, now)
            on_check(Look(records, [step] * len(records), psnr, now, lambda: stepper.parameters))
            if records[0].reason:
                break
        stepper.update()
    return stepper.last_finite(), records
