"""Sequences of different length as rows that hold the real steps only, and back."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def active_steps(lengths: Tensor, T: int) -> Tensor:
    """(T, B) bool: row b is active while t < lengths[b]."""
    return torch.arange(T, device=lengths.device)[:, None] < lengths


def lengths_of(sizes: Sequence[int], device: torch.device) -> Tensor:
    """The lengths (B,) of the rows of a PackedSequence, longest first."""
    counts = torch.tensor([*sizes, 0])
    # counts[t] - counts[t + 1] rows are t + 1 long.
    ended = (counts[:-1] - counts[1:]).flip(0)
    steps = torch.arange(len(sizes), 0, -1)
    return steps.repeat_interleave(ended).to(device)


def offsets_of(sizes: Sequence[int], device: torch.device) -> Tensor:
    """(T,) int64: the row at which each step begins."""
    counts = torch.tensor(sizes, dtype=torch.int64)
    return (counts.cumsum(0) - counts).to(device)


class Rows(NamedTuple):
    """Where the rows of each step lie: sizes[t] of them are active at step t, longest sequence
    first. Without `steps` the rows are those of (T, B, _) as it is."""

    sizes: list[int]
    batch: int
    steps: Tensor | None = None  # (N,): the time step of each row
    sequences: Tensor | None = None  # (N,): its sequence
    order: Tensor | None = None  # (B,): the sequences, longest first

    @classmethod
    def equal(cls, T: int, B: int) -> "Rows":
        return cls([B] * T, B)

    @classmethod
    def of_lengths(cls, lengths: Tensor, T: int) -> "Rows":
        """For lengths (B,) in any order; on another device than the CPU, waits for it."""
        order = torch.argsort(lengths, descending=True, stable=True)
        steps, places = active_steps(lengths[order], T).nonzero(as_tuple=True)
        sizes = torch.bincount(steps, minlength=T).tolist()
        while sizes and sizes[-1] == 0:
            sizes.pop()
        return cls(sizes, len(lengths), steps, order[places], order)

    def gather(self, x: Tensor) -> Tensor:
        """(T, B, F) -> (N, F)."""
        if self.steps is None:
            return x.reshape(-1, x.size(2))
        return x[self.steps, self.sequences]

    def scatter_(self, rows: Tensor, x: Tensor) -> Tensor:
        """(N, F) into x (T, B, F), which keeps what it holds at other places."""
        if self.steps is None:
            return x.copy_(rows.view(x.shape))
        x[self.steps, self.sequences] = rows
        return x

    def sort(self, state: Tensor) -> Tensor:
        """A state (B, H), longest sequence first."""
        return state if self.order is None else state[self.order]

    def unsort(self, state: Tensor) -> Tensor:
        if self.order is None:
            return state
        return torch.empty_like(state).index_copy_(0, self.order, state)
