"""What a layer reads, and how the tensors that have steps lie in memory. Needs no triton."""

import math
from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """What one layer's recurrence reads. The rows of step t are x_gates[t]; or, where rows of
    different length are packed, x_gates[offsets[t] : offsets[t] + the number of active rows]."""

    x_gates: Tensor  # (T, B, D * G * H), or packed (N, D * G * H)
    state0: tuple[Tensor, ...]  # S tensors (D, B, H)
    weight_hh: Tensor  # (D, G * H, H)
    params: tuple[Tensor, ...] = ()  # each (D, H)
    lengths: Tensor | None = None  # (B,): row b is active while t < lengths[b]
    offsets: Tensor | None = None  # (T,) int64, with lengths, then longest row first: packed
    reverse: bool = False  # direction 0 walks from T - 1 down to 0, and direction 1 upwards
    h_mask: Tensor | None = None  # (D, B, H): W_hh takes h_mask * h
    keep: Tensor | None = None  # as x_gates, D * S * H wide: what a state keeps of its old value
    grad_clip: float | None = None  # the gradient that a step hands to h before it lies in [-c, c]


def is_batch_major(steps: Tensor) -> bool:
    """Whether the memory of a (T, B, _) tensor runs through all T of a row before the next row."""
    return steps.dim() == 3 and steps.stride(1) > steps.stride(0)


def empty_steps(like: Tensor, width: int) -> Tensor:
    """An unwritten (T, B, width) in the memory order of `like`, itself (T, B, _); or both packed,
    (N, width)."""
    if is_batch_major(like):
        return like.new_empty(like.size(1), like.size(0), width).transpose(0, 1)
    return like.new_empty(*like.shape[:-1], width)


def dense(steps: Tensor) -> Tensor:
    """The tensor itself, or a copy in its memory order, so that each row is one piece of memory."""
    if steps.stride(-1) == 1 or steps.size(-1) == 1:
        return steps
    return empty_steps(steps, steps.size(-1)).copy_(steps)


def stride_arguments(**tensors: Tensor | None) -> dict[str, int]:
    """The time and batch strides of the tensors with steps that there are, as a kernel takes them:
    <name>_stride_t and <name>_stride_b in units of UNIT elements, the largest power of two, at most
    16, that divides them all; 1 where a tensor begins between the widest accesses of a thread,
    which then take single elements. Packed, both are the stride from row to row."""
    steps = {name: x for name, x in tensors.items() if x is not None}
    strides = {name: (x.stride(0), x.stride(-2)) for name, x in steps.items()}
    unit = math.gcd(16, *(stride for pair in strides.values() for stride in pair))
    if any(x.data_ptr() % 16 for x in steps.values()):
        unit = 1
    arguments = {"UNIT": unit}
    for name, (stride_t, stride_b) in strides.items():
        arguments[f"{name}_stride_t"] = stride_t // unit
        arguments[f"{name}_stride_b"] = stride_b // unit
    return arguments
