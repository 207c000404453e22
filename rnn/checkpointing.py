"""Layers that keep every K-th state alone, and compute the steps between anew in backward."""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .cells import CELLS, Tensors
from .layer import Spec, time_major
from .run import run


def check_checkpoint_every(every: Any, proj_size: int) -> int | None:
    """Raise TypeError unless it is None or an int; ValueError below 1, and with projections."""
    if every is None:
        return None
    try:  # an int of any library
        whole = operator.index(every)
    except TypeError:
        whole = None
    if whole is None or isinstance(every, bool):
        raise TypeError(f"checkpoint_every must be an int or None, got {every!r}")
    if whole < 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {every}")
    if proj_size:
        raise ValueError(f"checkpoint_every needs proj_size=0, got proj_size={proj_size}")
    return whole


def run_in_pieces(
    every: int,
    spec: Spec,  # states are (D, B, H)
    backend: str,
    x: Tensor,
    lengths: Tensor | None,
    tensors: Tensors,
    batch_sizes: Tensor | None = None,  # spec.sizes says the same
) -> tuple[Tensor, Tensors]:
    """As run.run, in pieces of `every` steps, of which each direction keeps the first state.

    What a backward pass finds is the input and, for each piece, S * B * H numbers in each
    direction. It computes a piece once more when its turn comes, with the bits of the first time.
    """
    S, D = CELLS[spec.cell].states, spec.directions
    regularisers, weights = spec.regularisers(tensors), tensors[spec.first_weight :]
    each = len(weights) // D
    outputs, last = [], []
    for d in range(D):
        one = spec._replace(directions=1, reverse=spec.reverse != bool(d))
        state = tuple(s[d : d + 1] for s in tensors[:S])
        of_direction = weights[d * each : (d + 1) * each]
        mine = regularisers.of_direction(d, D)
        h_mask = () if mine.h_mask is None else (mine.h_mask.unsqueeze(0),)
        keep = () if mine.keep is None else (mine.keep,)
        parts = []
        for piece, rows, ends in pieces(every, one, (x, *keep), lengths):
            begun = (*state, *h_mask)
            if rows is not None:
                begun = tuple(s[:, :rows] for s in begun)
            output, after = checkpoint(
                run,
                piece[0],
                backend,
                piece[1],
                ends,
                (*begun, *piece[2:], *of_direction),
                use_reentrant=False,
                preserve_rng_state=False,
            )
            parts.append(output)
            if rows is None:
                state = after
            else:  # packed rows that have ended, or not begun
                state = tuple(torch.cat((a, s[:, rows:]), 1) for a, s in zip(after, state))
        outputs.append(torch.cat(parts[::-1] if one.reverse else parts, int(spec.batch_first)))
        last.append(state)
    output = outputs[0] if D == 1 else torch.cat(outputs, -1)
    return output, tuple(torch.cat(states) for states in zip(*last))


def pieces(
    every: int, spec: Spec, steps: Tensors, lengths: Tensor | None
) -> Iterator[tuple[tuple[Any, ...], int | None, Tensor | None]]:
    """The steps in the order of the walk, `every` at a time: the spec and of each tensor its part;
    packed, how many rows it has; and the lengths that are left in it."""
    T = len(spec.sizes) if spec.sizes is not None else time_major(spec, steps[0]).size(0)
    starts = range(0, T, every)
    offsets = [0]
    for n in spec.sizes or ():
        offsets.append(offsets[-1] + n)
    for first in reversed(starts) if spec.reverse else starts:
        end = min(first + every, T)
        if spec.sizes is not None:
            of_piece = spec._replace(sizes=spec.sizes[first:end])
            rows = slice(offsets[first], offsets[end])
            yield (of_piece, *(x[rows] for x in steps)), spec.sizes[first], None
        else:
            ends = None if lengths is None else (lengths - first).clamp(0, end - first)
            part = int(spec.batch_first), first, end - first
            yield (spec, *(x.narrow(*part) for x in steps)), None, ends
