"""Functions of tiles that derived cells are made of, beside those in cells.py.

As PyTorch has them: a NaN comes out as a NaN, and infinities where PyTorch has them.
"""

import triton
import triton.language as tl


@triton.jit
def exp(x, APPROXIMATE: tl.constexpr):
    """exp(x); to three units in the last place, as cells.exp_negative, unless APPROXIMATE."""
    if APPROXIMATE:
        e = tl.exp(x)
    else:
        x = maximum(minimum(x, 150.0), -150.0)
        y = x * 1.4426950216293335  # log2(e) as float32 has it
        lost = tl.fma(x, 1.4426950216293335, -y) + x * 1.925963033500011e-8
        e = tl.exp2(y)
        e = tl.where(e == float("inf"), e, e + e * (lost * 0.6931471805599453))
    return e


@triton.jit
def log1p(x):
    """log(1 + x). What rounding took away of 1 + x comes back as a factor (Kahan)."""
    y = 1.0 + x
    rounded = y - 1.0
    inside = (rounded == 0.0) | (y == float("inf"))
    return tl.where(inside, x, tl.log(y) * (x / rounded))


@triton.jit
def expm1(x):
    """exp(x) - 1, by the same way round."""
    e = exp(x, False)
    rounded = e - 1.0
    y = rounded * (x / tl.log(e))
    y = tl.where(rounded == -1.0, -1.0, y)
    y = tl.where(e == float("inf"), e, y)
    return tl.where(e == 1.0, x, y)


@triton.jit
def relu(x):
    return tl.where(x < 0.0, 0.0, x)  # not tl.maximum, which would lose a NaN


@triton.jit
def sign(x):
    s = tl.where(x < 0.0, -1.0, 0.0)
    return tl.where(x > 0.0, 1.0, s)  # of a NaN 0, as PyTorch has it


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
