"""How the (T, B, features) tensors of a layer lie in memory. Needs no triton."""

import math
from typing import NamedTuple

from torch import Tensor


def is_batch_major(steps: Tensor) -> bool:
    """Whether the memory of a (T, B, _) tensor runs through all T of a row before the next row."""
    return steps.stride(1) > steps.stride(0)


def empty_steps(like: Tensor, width: int) -> Tensor:
    """An unwritten (T, B, width) in the memory order of `like`, itself (T, B, _)."""
    T, B, _ = like.shape
    if is_batch_major(like):
        return like.new_empty(B, T, width).transpose(0, 1)
    return like.new_empty(T, B, width)


def stride_arguments(**steps: Tensor) -> dict[str, int]:
    """The time and batch strides of (T, B, _) tensors, as a kernel takes them: <name>_stride_t and
    <name>_stride_b in units of UNIT elements, the largest power of two, at most 16, that divides
    them all."""
    unit = math.gcd(16, *(stride for x in steps.values() for stride in x.stride()[:2]))
    arguments = {"UNIT": unit}
    for name, x in steps.items():
        arguments[f"{name}_stride_t"] = x.stride(0) // unit
        arguments[f"{name}_stride_b"] = x.stride(1) // unit
    return arguments


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
