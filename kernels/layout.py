"""How the (T, B, features) tensors of a layer lie in memory. Needs no triton."""

import math

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


def stride_unit(*steps: Tensor) -> int:
    """The largest power of two, at most 16, that divides the time and batch strides of all."""
    return math.gcd(16, *(stride for x in steps for stride in x.stride()[:2]))
