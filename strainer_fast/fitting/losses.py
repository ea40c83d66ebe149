"""Losses on their way from the device to the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass
class Sent:
    """Losses of some steps that have left the device, or are about to."""

    host: Tensor  # [steps, N]
    known: list[bool]
    watched: list[Tensor]
    arrived: torch.cuda.Event | None
    rows: Sequence[int] | None = None  # which columns still belong to somebody

    def read(self) -> NDArray[np.float64]:  # [steps, N]
        """Waits for these losses, not for what the device was asked for afterwards."""
        if self.arrived is not None:
            self.arrived.synchronize()
        seen: NDArray[np.float64] = self.host.double().numpy()
        return seen if self.rows is None else seen[:, list(self.rows)]


class Losses:
    """Losses [N] of the steps that the host has not seen yet, oldest first."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, bool]] = []
        self._sent: deque[Sent] = deque()

    def add(self, losses: Tensor, known: bool) -> None:
        """Of one step; `known` where they are of all points."""
        self._waiting.append((losses, known))

    @property
    def last(self) -> tuple[Tensor, bool]:
        """What was added last."""
        return self._waiting[-1]

    def replace_last(self, losses: Tensor) -> None:
        """The same step measured on all points."""
        self._waiting[-1] = losses, True

    @property
    def under_way(self) -> bool:
        """Whether some were sent and not taken."""
        return bool(self._sent)

    @property
    def unseen(self) -> bool:
        """Whether there are any."""
        return bool(self._sent or self._waiting)

    def send(self, watched: Sequence[Tensor] = ()) -> None:
        """All that wait leave for the host now, with other tensors of the device; nobody waits for them."""
        losses, known = zip(*self._waiting, strict=True)
        self._waiting.clear()
        tensors = [torch.stack(losses), *watched]
        arrived = None
        if tensors[0].is_cuda:
            tensors = [
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True, device="cpu").copy_(t, non_blocking=True)
                for t in tensors
            ]
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        else:
            tensors = [tensors[0], *(t.clone() for t in tensors[1:])]
        self._sent.append(Sent(tensors[0], list(known), tensors[1:], arrived))

    def take(self) -> tuple[NDArray[np.float64], list[bool], list[Tensor]]:  # [steps, N], [steps], what was watched
        """Those that were sent first."""
        sent = self._sent.popleft()
        return sent.read(), sent.known, sent.watched

    def take_all(self) -> tuple[NDArray[np.float64], list[bool]]:  # [steps, N], [steps]
        """Those that were sent and those that wait."""
        if self._waiting:
            self.send()
        parts = [self.take() for _ in range(len(self._sent))]
        return np.concatenate([seen for seen, _, _ in parts]), [k for _, known, _ in parts for k in known]

    def select(self, rows: Sequence[int]) -> None:
        """Of these networks only, from now on."""
        for sent in self._sent:
            sent.rows = list(rows) if sent.rows is None else [sent.rows[row] for row in rows]
        index = torch.tensor(rows, device="cpu")
        self._waiting = [(losses[index.to(losses.device)], known) for losses, known in self._waiting]
