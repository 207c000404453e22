"""Processes that torchrun started, on one machine or many, each with its share of every batch.

Of B streams of text process r of n reads the columns r, r + n, r + 2 n, ...; the gradients meet in
DistributedDataParallel, through gloo on CPUs and NCCL on GPUs. The first process alone reads and
writes files and prints.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .cli import JobError

T = TypeVar("T")


class ForwardIs(nn.Module):
    """A method of a model as its forward, which is all that DistributedDataParallel wraps."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, *args: Any) -> Any:
        return getattr(self.model, self.method)(*args)


@dataclass(frozen=True)
class Processes:
    """This process among the others; alone unless torchrun started more. Each method but `first`
    and `columns` is called by all of them at the same place."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def columns(self) -> slice:
        """Of a whole batch, those of this process."""
        return slice(self.rank, None, self.count)

    def wrap(self, model: nn.Module, method: str) -> Callable[..., Any]:
        """A method of the model. If there are more processes, its backward pass leaves in each the
        mean of all their gradients, and all begin with the weights of the first."""
        if self.count == 1:
            return getattr(model, method)
        return nn.parallel.DistributedDataParallel(ForwardIs(model, method))

    def total(self, *values: float) -> list[float]:
        """The sum over all processes of each value."""
        if self.count == 1:
            return [*values]
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def any(self, one: bool) -> bool:
        """Whether it is true of any process."""
        return self.total(one)[0] > 0

    def gather(self, part: Tensor) -> Tensor:
        """Of the columns (L, B / count, H) of each process the whole, (L, B, H)."""
        if self.count == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.count)]
        dist.all_gather(parts, part.contiguous())
        return torch.stack(parts, 2).flatten(1, 2)

    def by_first(self, make: Callable[[], T]) -> T:
        """What make() gives in the first process, in all of them. A JobError or an interrupt there
        ends the others too, without a word."""
        if self.count == 1:
            return make()
        outcome: list[Any] = [None, 0]  # and the exit status
        if self.first:
            try:
                outcome[0] = make()
            except (JobError, KeyboardInterrupt) as error:
                status = 2 if isinstance(error, JobError) else 128 + getattr(error, "signal", 2)
                dist.broadcast_object_list([None, status])
                raise
        dist.broadcast_object_list(outcome)
        if outcome[1]:
            raise SystemExit(outcome[1])
        return outcome[0]


@contextmanager
def processes(batch: int) -> Iterator[Processes]:
    """Join the processes that torchrun started, for a while. What the others than the first print
    is dropped. Each takes the GPU of its number on its machine; JobError where there is none, and
    where they cannot share a batch of so many columns equally."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield Processes()
        return
    rank, count, number = (int(os.environ[x]) for x in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if batch % count:
        raise JobError(f"{batch} streams are not divisible by {count} processes: start fewer")
    if torch.cuda.is_available():
        if number >= (gpus := torch.cuda.device_count()):
            raise JobError(f"{number + 1} processes on a machine with {gpus} GPUs: start fewer")
        torch.cuda.set_device(number)
    dist.init_process_group()
    try:
        with nullcontext() if rank == 0 else redirect_stdout(None):
            yield Processes(rank, count)
    finally:
        dist.destroy_process_group()
