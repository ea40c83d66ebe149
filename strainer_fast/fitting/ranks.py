"""Processes that pre-train one encoder together: each has some of the signals and their heads."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from strainer_fast._checks import bad_input
from strainer_fast.fitting.recipe import Recipe


class Ranks:
    """One process of several, by torch.distributed's default group; alone without one.

    Args:
        number: of signals: rank r of w has those from number * r // w up to number * (r + 1) // w.
        distributed: whether to share them.
        recipe: of pre-training.

    Raises InputError where no process group is there, it has more processes than there are signals, or the recipe's
    steps need all signals in one place.
    """

    def __init__(self, number: int, distributed: bool, recipe: Recipe) -> None:
        self.number, self.rank, self.world = number, 0, 1
        if distributed:
            if not (dist.is_available() and dist.is_initialized()):
                fix = "Call torch.distributed.init_process_group, or run the command line under torchrun."
                raise bad_input("distributed", "a process group of torch.distributed", "none", fix)
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if self.world > number:
            raise bad_input("processes", f"at most {number}, one for each signal", self.world, "Start fewer.")
        if self.world > 1 and (recipe.pretrain_method != "strainer" or recipe.pretrain_optimiser == "kfac"):
            got = f"{recipe.pretrain_method} with {recipe.pretrain_optimiser}"
            fix = 'Of the presets, "paper" and "fast" can.'
            raise bad_input("recipe of several processes", "strainer with adam or muon", got, fix)
        self.own = slice(number * self.rank // self.world, number * (self.rank + 1) // self.world)

    @property
    def alone(self) -> bool:
        """Whether this process has all signals."""
        return self.world == 1

    def device(self, asked: str) -> str:
        """The device of this process: a GPU of its own where GPUs are asked for."""
        if self.alone or asked not in ("auto", "cuda") or not torch.cuda.is_available():
            return asked
        return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % torch.cuda.device_count()}"

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over the ranks, in one message."""
        if self.alone:
            return
        flat = torch.cat([t.detach().reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def all_true(self, flag: Tensor) -> Tensor:
        """Whether a bool [] holds on every rank."""
        if self.alone:
            return flag
        value = flag.to(torch.int32)
        dist.all_reduce(value, dist.ReduceOp.MIN)
        return value.bool()

    def most(self, counts: Tensor) -> None:
        """Replace counts by the largest of any rank."""
        if not self.alone:
            dist.all_reduce(counts, dist.ReduceOp.MAX)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether a flag of the host is set on any rank."""
        return flag if self.alone else not bool(self.all_true(torch.tensor(not flag, device=device)))

    def whole(self, own: Tensor) -> Tensor:
        """The rows [N, ...] of all signals from those of this rank's."""
        if self.alone:
            return own
        rows = own.new_zeros(self.number, *own.shape[1:])
        rows[self.own] = own.detach()
        dist.all_reduce(rows)  # zeros but for one rank: ranks may differ in length
        return rows
