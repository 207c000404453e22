"""The cells as tiles: what one time step computes and, beside it, its vector-Jacobian product.

The same pairs, under the same names, as in rnn/cells.py, where the equations are discussed. Maths
only: no pointer, no load, no store. Arguments and results are tuples of float32 tiles of shape
(hidden units, batch rows), params of (hidden units, 1); where the tiles come from is the business
of the loops.

    step(x_gates, h_gates, state, params, APPROXIMATE) -> state, saved
    step_vjp(d_state, state_prev, state, saved, params, APPROXIMATE)
            -> d_x_gates, d_h_gates, d_state_prev, d_params

APPROXIMATE allows the chip's own tanh, good enough where results are rounded to 16 bits. In
d_state_prev a 0.0 stands where nothing reaches the previous state past W_hh.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# ------------------------------------------------------------------------------- the functions


@triton.jit
def exp_negative(x):
    """exp(x) for x <= 0 within three units in the last place; 0 where float32 ends.

    The chip has exp2 alone. The product x * log2(e) is rounded, by up to x * 2^-24, which exp2
    would turn into as much relative error; what the rounding took away is put back as a factor.
    """
    x = tl.maximum(x, -150.0, propagate_nan=tl.PropagateNan.ALL)
    y = x * 1.4426950216293335  # log2(e) as float32 has it
    lost = tl.fma(x, 1.4426950216293335, -y) + x * 1.925963033500011e-8
    e = tl.exp2(y)
    return e + e * (lost * 0.6931471805599453)


@triton.jit
def tanh(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        # One instruction of the special function unit (PTX ISA: sm_75 and up), error 2^-11.
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    # Near 0, where 1 - e would lose all digits, the odd polynomial x + x^3 p(x^2): the one with the
    # least relative error on [0, 0.55], 3.7e-8. Elsewhere exp(-2|x|), which never overflows.
    a = tl.abs(x)
    u = tl.minimum(a, 0.55) * tl.minimum(a, 0.55)
    p = ((0.0164375621 * u - 0.0526718021) * u + 0.133207248) * u - 0.333329466
    near = x + x * u * p
    e = tl.exp(-2.0 * a)
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0.0, -far, far)
    return tl.where(a < 0.55, near, far)


@triton.jit
def sigmoid(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        return 0.5 + 0.5 * tanh(0.5 * x, APPROXIMATE)
    # exp(-|x|) never overflows, and for x far below 0 it is the result, with all its digits.
    e = exp_negative(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


# ----------------------------------------------------------------------------------- the cells


@triton.jit
def rnn_tanh_step(x_gates, h_gates, state, params, APPROXIMATE: tl.constexpr):
    return (tanh(x_gates[0] + h_gates[0], APPROXIMATE),), ()


@triton.jit
def rnn_tanh_step_vjp(d_state, state_prev, state, saved, params, APPROXIMATE: tl.constexpr):
    d = d_state[0] * (1.0 - state[0] * state[0])
    return (d,), (d,), (0.0,), ()


@triton.jit
def rnn_relu_step(x_gates, h_gates, state, params, APPROXIMATE: tl.constexpr):
    a = x_gates[0] + h_gates[0]
    return (tl.where(a < 0.0, 0.0, a),), ()  # not tl.maximum, which would lose a NaN


@triton.jit
def rnn_relu_step_vjp(d_state, state_prev, state, saved, params, APPROXIMATE: tl.constexpr):
    d = tl.where(state[0] <= 0.0, 0.0, d_state[0])  # the slope of a NaN is 1, as PyTorch has it
    return (d,), (d,), (0.0,), ()


@triton.jit
def gru_step(x_gates, h_gates, state, params, APPROXIMATE: tl.constexpr):
    r = sigmoid(x_gates[0] + h_gates[0], APPROXIMATE)
    z = sigmoid(x_gates[1] + h_gates[1], APPROXIMATE)
    m = h_gates[2] + params[0]
    n = tanh(x_gates[2] + r * m, APPROXIMATE)
    return ((1.0 - z) * n + z * state[0],), (r, z, n, m)


@triton.jit
def gru_step_vjp(d_state, state_prev, state, saved, params, APPROXIMATE: tl.constexpr):
    r = saved[0]
    z = saved[1]
    n = saved[2]
    m = saved[3]
    d_h = d_state[0]
    d_n = d_h * (1.0 - z) * (1.0 - n * n)
    d_m = d_n * r
    d_r = d_n * m * r * (1.0 - r)
    d_z = d_h * (state_prev[0] - n) * z * (1.0 - z)
    return (d_r, d_z, d_n), (d_r, d_z, d_m), (d_h * z,), (d_m,)


@triton.jit
def lstm_step(x_gates, h_gates, state, params, APPROXIMATE: tl.constexpr):
    i = sigmoid(x_gates[0] + h_gates[0], APPROXIMATE)
    f = sigmoid(x_gates[1] + h_gates[1], APPROXIMATE)
    g = tanh(x_gates[2] + h_gates[2], APPROXIMATE)
    o = sigmoid(x_gates[3] + h_gates[3], APPROXIMATE)
    c = f * state[1] + i * g
    return (o * tanh(c, APPROXIMATE), c), (i, f, g, o)


@triton.jit
def lstm_step_vjp(d_state, state_prev, state, saved, params, APPROXIMATE: tl.constexpr):
    i = saved[0]
    f = saved[1]
    g = saved[2]
    o = saved[3]
    tanh_c = tanh(state[1], APPROXIMATE)
    d_h = d_state[0]
    d_c = d_state[1] + d_h * o * (1.0 - tanh_c * tanh_c)
    d_i = d_c * g * i * (1.0 - i)
    d_f = d_c * state_prev[1] * f * (1.0 - f)
    d_g = d_c * i * (1.0 - g * g)
    d_o = d_h * tanh_c * o * (1.0 - o)
    d_gates = (d_i, d_f, d_g, d_o)
    return d_gates, d_gates, (0.0, d_c * f), ()


class TileCell(NamedTuple):
    step: triton.JITFunction
    step_vjp: triton.JITFunction
    # Whether step reads h itself and not through W_hh alone. Then h is carried in float32 from
    # step to step, since a small change of a 16-bit h would be rounded away again and again.
    reads_h: bool = False
    # Which states step_vjp reads at all, and whether it reads them before the step too: of the
    # others nothing is loaded. In `state` and `state_prev` stands anything for them.
    reads: tuple[int, ...] = (0,)
    recalls: bool = False


CELLS = {
    "rnn_tanh": TileCell(rnn_tanh_step, rnn_tanh_step_vjp),
    "rnn_relu": TileCell(rnn_relu_step, rnn_relu_step_vjp),
    "gru": TileCell(gru_step, gru_step_vjp, reads_h=True, recalls=True),
    "lstm": TileCell(lstm_step, lstm_step_vjp, reads=(1,), recalls=True),
}


def has_tiles(cell: Any) -> bool:
    return cell.name in CELLS or hasattr(cell, "tiles")


def tiles_of(cell: Any) -> TileCell:
    """The tiles of a cell. A cell that rnn.cell derived has them made where they are first used."""
    if cell.name not in CELLS:
        CELLS[cell.name] = cell.tiles()
    return CELLS[cell.name]
