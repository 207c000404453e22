"""Sequences that `resets` cut into segments: each is a packed row of its own.

A segment begins at a sequence's first step and at each step where a reset is set. Nothing passes
from one segment to another, in either direction of time, so they need not run one after another:
all segments of the batch run side by side, and the loop has as many steps as the longest of them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def check_resets(resets: Any, shape: tuple[int, ...]) -> None:
    """Raise TypeError unless resets is a bool Tensor, ValueError unless of this shape, and
    RuntimeError where its values cannot be looked at."""
    if not isinstance(resets, Tensor):
        raise TypeError(f"resets must be a Tensor, got {type(resets).__name__}")
    if resets.dtype != torch.bool:
        raise TypeError(f"resets must be torch.bool, got {resets.dtype}")
    if tuple(resets.shape) != shape:
        raise ValueError(f"resets must have shape {shape}, got {tuple(resets.shape)}")
    traced = torch._C._get_tracing_state() is not None
    if traced or resets.is_meta or isinstance(resets, FakeTensor):
        raise RuntimeError(
            "resets decide how many rows each step has, so their values must be at hand: a call "
            "with resets cannot be traced, exported or run on tensors without data"
        )


class Ends(NamedTuple):
    """The segments at one end of the sequences that have steps: sequences[k]'s is segments[k]."""

    segments: Tensor
    sequences: Tensor


class Segments(NamedTuple):
    """Where the steps of a batch (T, B) lie as packed rows, of which one segment is one row."""

    shape: tuple[int, int]  # T, B
    sizes: list[int]  # segments that are active at each step, the longest first
    total: int  # segments
    steps: Tensor  # (N,): the step t * B + b of each packed row
    first: Ends
    last: Ends
    fresh: Tensor  # (B,) bool: a reset before the very first step

    @classmethod
    def of(cls, resets: Tensor, lengths: Tensor | None) -> "Segments":
        """For resets (T, B), and lengths (B,) on the same device; waits for it. Work and memory
        are of the order of T * B, however unequal the segments are."""
        (T, B), device = resets.shape, resets.device
        time = torch.arange(T, device=device)
        begins = resets.t().clone()  # (B, T): sequences first, so that segments lie in one piece
        begins[:, :1] = True
        if lengths is not None:
            begins &= time < lengths[:, None]
        sequence, start = begins.nonzero(as_tuple=True)  # of each segment, in this order
        count = len(start)
        is_first = torch.ones(count, dtype=torch.bool, device=device)
        is_first[1:] = sequence[1:] != sequence[:-1]
        is_last = is_first.roll(-1)
        end = start.roll(-1)
        end[is_last] = T if lengths is None else lengths[sequence[is_last]].to(end.dtype)
        longest_first = torch.argsort(end - start, descending=True, stable=True)
        place = torch.empty_like(longest_first)  # of each segment among the packed rows
        place[longest_first] = torch.arange(count, device=device)
        # Each step's segment, and how many steps of that came before it.
        segment = begins.flatten().cumsum(0) - 1
        step = time.repeat(B)
        sources = torch.arange(T * B, device=device).view(T, B).t().flatten()
        if lengths is not None:
            active = (time < lengths[:, None]).flatten()
            segment, step, sources = segment[active], step[active], sources[active]
        step = step - start[segment]
        sizes = torch.bincount(step)
        offsets = sizes.cumsum(0) - sizes
        steps = torch.empty_like(sources)
        steps[offsets[step] + place[segment]] = sources
        return cls(
            (T, B),
            sizes.tolist(),
            count,
            steps,
            Ends(place[is_first], sequence[is_first]),
            Ends(place[is_last], sequence[is_last]),
            resets[0],
        )

    def gather(self, x: Tensor) -> Tensor:
        """(T, B, F) -> (N, F)"""
        return x.reshape(-1, x.size(2)).index_select(0, self.steps)

    def scatter(self, rows: Tensor) -> Tensor:
        """(N, F) -> (T, B, F), zero at steps that are in no segment."""
        T, B = self.shape
        steps = rows.new_zeros(T * B, rows.size(1)).index_copy(0, self.steps, rows)
        return steps.view(T, B, -1)

    def enter(self, states: Tensor, backwards: Sequence[bool]) -> Tensor:
        """The segments' first states, (K, total, H), of the sequences', (K, B, H), where
        backwards[k] is the direction of the k-th: zero but where a sequence begins."""
        entered = []
        for state, back in zip(states, backwards):
            ends = self.last if back else self.first
            if not back:
                state = state.masked_fill(self.fresh[:, None], 0)
            zeros = state.new_zeros(self.total, state.size(1))
            entered.append(zeros.index_copy(0, ends.segments, state[ends.sequences]))
        return torch.stack(entered)

    def leave(self, states: Tensor, before: Tensor | None, backwards: Sequence[bool]) -> Tensor:
        """The sequences' last states, (K, B, H), of the segments', (K, total, H). Sequences
        without a step have the state that was before: zero if None."""
        if before is None:
            before = states.new_zeros(states.size(0), self.shape[1], states.size(2))
        left = []
        for state, initial, back in zip(states, before.to(states.dtype), backwards):
            ends = self.first if back else self.last
            left.append(initial.index_copy(0, ends.sequences, state[ends.segments]))
        return torch.stack(left)
