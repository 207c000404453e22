"""The cells: what one time step computes, and beside it the vector-Jacobian product of the step.

Maths only: no pointer, no load, no store. Every argument and result is a tuple of float32 tiles
of shape (hidden units, batch rows); where the tiles come from is the business of recurrence.py.
"""

from dataclasses import dataclass

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    # exp of -2|x| never overflows; the sign is put back afterwards.
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def tanh_approx(x):
    # One instruction of the special function unit (PTX ISA: sm_75 and up), relative error 2^-11.
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def rnn_tanh_step(x_gates, h_gates, state):
    return (tanh(x_gates[0] + h_gates[0]),)


@triton.jit
def rnn_tanh_step_approx(x_gates, h_gates, state):
    return (tanh_approx(x_gates[0] + h_gates[0]),)


@triton.jit
def rnn_tanh_step_vjp(d_state, saved):
    d = d_state[0] * (1.0 - saved[0] * saved[0])
    return (d,), (d,), ()


@triton.jit
def rnn_relu_step(x_gates, h_gates, state):
    a = x_gates[0] + h_gates[0]
    return (tl.where(a < 0.0, 0.0, a),)  # not tl.maximum, which would lose a NaN


@triton.jit
def rnn_relu_step_vjp(d_state, saved):
    d = tl.where(saved[0] > 0.0, d_state[0], 0.0)
    return (d,), (d,), ()


@dataclass(frozen=True)
class Cell:
    """One recurrent cell, as data for the loops of recurrence.py.

    step(x_gates, h_gates, state) -> state
    step_vjp(d_state, saved) -> d_x_gates, d_h_gates, d_prev: the gradients with respect to the
    gates, and what reaches the previous state past W_hh (an empty tuple where nothing does).
    `saved` is what the forward pass left for step t: for the Elman cells, (output[t],).
    step_approx is step with the chip's own tanh, good enough where the result is rounded to 16
    bits.
    """

    name: str
    gates: int
    step: triton.JITFunction
    step_approx: triton.JITFunction
    step_vjp: triton.JITFunction


CELLS = {
    cell.name: cell
    for cell in (
        Cell("rnn_tanh", 1, rnn_tanh_step, rnn_tanh_step_approx, rnn_tanh_step_vjp),
        Cell("rnn_relu", 1, rnn_relu_step, rnn_relu_step, rnn_relu_step_vjp),
    )
}
