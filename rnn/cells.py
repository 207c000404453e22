"""The cells: what one time step computes and, beside it, its vector-Jacobian product (VJP).

This is the one table of cells. Everything else reads it: the loops of both backends, the modules,
the plan, the benchmarks and the tests. `kernels/cells.py` holds the same pair of functions for
each cell as tiles of Triton, under the same names. To add a cell, write the pair in both files and
add a line to the table below.

Every argument and result is a tuple. In PyTorch its members are tensors (..., B, H); the functions
are pointwise, so they serve one step or all steps at once, and autograd can differentiate them.

    step(x_gates, h_gates, state, params) -> state, saved
        x_gates  the G gates of W_ih x_t + b, one tensor each
        h_gates  the G gates of W_hh h_{t-1}
        state    the S states before the step; state[0] is h, the one that W_hh multiplies
        params   the cell's vectors per hidden unit, each (H,): first b_hh of each gate where it
                 stands inside the step (inner_bias), then those of its own (own_params)
        saved    what the VJP needs beside the states

    step_vjp(d_state, state_prev, state, saved, params)
            -> d_x_gates, d_h_gates, d_state_prev, d_params
        state_prev, state  the states before and after the step, as the forward pass stored them
        d_state_prev       what reaches the previous state past W_hh; None where nothing does
        d_params           one tensor of the shape of a state for each param, to be summed over
                           steps and rows

The VJP is linear in d_state, as every VJP is, and depends on it in no other way.

The forward pass stores, for each step, all states and `saved`. So a layer keeps, in numbers for
each (t, b, h): 1 (tanh, relu), 5 (GRU), 6 (LSTM).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Cell:
    """One recurrent cell, as data for the loops. The functions are described at the top."""

    name: str
    gates: int  # G
    states: int  # S
    saved: int  # how many tensors step saves beside the states
    step: Callable[[Tensors, Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]
    step_vjp: Callable[[Tensors, Tensors, Tensors, Tensors, Tensors], Any]
    params: tuple[str, ...] = ()  # the names of all: inner biases first, then the own ones
    inner_bias: tuple[int, ...] = ()  # gates whose b_hh is no part of x_gates: params[k] is it
    split: tuple[int, ...] = ()  # gates whose d_h_gates differs from d_x_gates
    # Learnable vectors beside weights and biases: (name, initial value), the value a float or a
    # function that fills a tensor in place.
    own_params: tuple[tuple[str, Any], ...] = ()
    across: bool = False  # a step reads all units of a row, where others are pointwise

    @property
    def learned(self) -> tuple[tuple[str, Any], ...]:
        """What a module of the cell learns beside weights and biases, as own_params."""
        return self.own_params

    @property
    def stored(self) -> int:
        """Tensors that the forward pass stores for each step beside `output`."""
        return self.states - 1 + self.saved


# Elman (Finding structure in time, 1990): h = tanh(x + W_hh h). The slope at a step is a function
# of h alone, so nothing is saved beside it.


def rnn_tanh_step(
    x_gates: Tensors, h_gates: Tensors, state: Tensors, params: Tensors
) -> tuple[Tensors, Tensors]:
    return (torch.tanh(x_gates[0] + h_gates[0]),), ()


def rnn_tanh_step_vjp(
    d_state: Tensors, state_prev: Tensors, state: Tensors, saved: Tensors, params: Tensors
) -> Any:
    d = d_state[0] * (1 - state[0] * state[0])
    return (d,), (d,), (None,), ()


def rnn_relu_step(
    x_gates: Tensors, h_gates: Tensors, state: Tensors, params: Tensors
) -> tuple[Tensors, Tensors]:
    return (torch.relu(x_gates[0] + h_gates[0]),), ()


def rnn_relu_step_vjp(
    d_state: Tensors, state_prev: Tensors, state: Tensors, saved: Tensors, params: Tensors
) -> Any:
    # PyTorch's own slope: 0 up to 0, else 1, for NaN too.
    d = torch.where(state[0] <= 0, torch.zeros_like(d_state[0]), d_state[0])
    return (d,), (d,), (None,), ()


# GRU (Cho et al., 2014) in PyTorch's form, gates r, z, n: b_hn stands inside the product with r,
# so it is a param and no part of x_gates. Saved are r, z, n and the reset gate's factor
# W_hn h + b_hn. n could be had back from h = (1 - z) n + z h_prev, but not where z is near 1; the
# factor could be had back by one more product with W_hn, a third of the pass's own work.


def gru_step(
    x_gates: Tensors, h_gates: Tensors, state: Tensors, params: Tensors
) -> tuple[Tensors, Tensors]:
    r = torch.sigmoid(x_gates[0] + h_gates[0])
    z = torch.sigmoid(x_gates[1] + h_gates[1])
    m = h_gates[2] + params[0]
    n = torch.tanh(x_gates[2] + r * m)
    return ((1 - z) * n + z * state[0],), (r, z, n, m)


def gru_step_vjp(
    d_state: Tensors, state_prev: Tensors, state: Tensors, saved: Tensors, params: Tensors
) -> Any:
    r, z, n, m = saved
    d_h = d_state[0]
    d_n = d_h * (1 - z) * (1 - n * n)  # of what stands inside tanh
    d_m = d_n * r
    d_r = d_n * m * r * (1 - r)
    d_z = d_h * (state_prev[0] - n) * z * (1 - z)
    return (d_r, d_z, d_n), (d_r, d_z, d_m), (d_h * z,), (d_m,)


# LSTM (Hochreiter and Schmidhuber, 1997) with a forget gate (Gers et al., 2000), gates i, f, g, o.
# Saved are the four gates; c is stored as a state, and tanh(c) is computed again: a sixth of the
# bytes against one function per unit. No gate can be had back from the others without a division
# that loses its digits where the divisor is near 0.


def lstm_step(
    x_gates: Tensors, h_gates: Tensors, state: Tensors, params: Tensors
) -> tuple[Tensors, Tensors]:
    i = torch.sigmoid(x_gates[0] + h_gates[0])
    f = torch.sigmoid(x_gates[1] + h_gates[1])
    g = torch.tanh(x_gates[2] + h_gates[2])
    o = torch.sigmoid(x_gates[3] + h_gates[3])
    c = f * state[1] + i * g
    return (o * torch.tanh(c), c), (i, f, g, o)


def lstm_step_vjp(
    d_state: Tensors, state_prev: Tensors, state: Tensors, saved: Tensors, params: Tensors
) -> Any:
    i, f, g, o = saved
    tanh_c = torch.tanh(state[1])
    d_h = d_state[0]
    d_c = d_state[1] + d_h * o * (1 - tanh_c * tanh_c)
    d_i = d_c * g * i * (1 - i)
    d_f = d_c * state_prev[1] * f * (1 - f)
    d_g = d_c * i * (1 - g * g)
    d_o = d_h * tanh_c * o * (1 - o)
    d_gates = d_i, d_f, d_g, d_o
    return d_gates, d_gates, (None, d_c * f), ()


CELLS = {
    cell.name: cell
    for cell in (
        Cell("rnn_tanh", 1, 1, 0, rnn_tanh_step, rnn_tanh_step_vjp),
        Cell("rnn_relu", 1, 1, 0, rnn_relu_step, rnn_relu_step_vjp),
        Cell("gru", 3, 1, 4, gru_step, gru_step_vjp, params=("b_hn",), inner_bias=(2,), split=(2,)),
        Cell("lstm", 4, 2, 4, lstm_step, lstm_step_vjp),
    )
}


def cell_of(cell: str | Cell) -> Cell:
    """A cell of the table, by its name or itself; raises ValueError where it is not there."""
    if not isinstance(cell, Cell):
        if cell not in CELLS:
            raise ValueError(f"cell must be one of {sorted(CELLS)}, got {cell!r}")
        return CELLS[cell]
    if CELLS.get(cell.name) is not cell:
        other = "is another one" if cell.name in CELLS else "is not there"
        raise ValueError(f"cell must be in rnn.cells.CELLS: {cell.name!r} {other}")
    return cell
