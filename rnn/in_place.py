"""The cells once more, in place, for the tuned PyTorch path. The equations are those of cells.py.

A cell that has no form here gets one from its step and VJP, whose results are copied (by_step).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .cells import Cell
from .derive import DerivedCell

Tensors = list[Tensor]
Range = tuple[int, int]


class InPlace(NamedTuple):
    """A cell's step and its VJP on views of buffers that hold all rows.

    A range of gates (first, last + 1) names a view: (n, H) of one gate, else (n, gates, H).

    step_(gates, inner, prev, new): `gates` are the views that step_ranges names. They hold x_gates
        + h_gates; where b_hh stands inside the step (Cell.inner_bias), x_gates alone, and `inner`
        is h_gates + b_hh. The new states are written, and over the gates what is to be saved.
    slopes(states, prev, saved, d, d_x): all rows of some steps at once, before their d_h is known.
        Writes into d and d_x, (n, H) for each gate, what d_h (or d_c) is to be multiplied by;
        returns further coefficients. d_x is d but for Cell.split.
    step_vjp_(d_h, d_states, d, d_x, coefficients): multiplies into d, the views that d_ranges
        names, and d_x, those of d_x_ranges; d_states are the gradients of the states beside h.
        After the views of gates, d holds (n, H) for the gradient of each of Cell.own_params.
    past: the last coefficient times d_h is what reaches the previous h past W_hh.
    own_states: false where h lies in the buffer of the gates.
    apart: the gates hold x_gates alone, `inner` is W_hh h of all gates, and what is to be saved
        is written into `new`, after the states.
    """

    step_ranges: tuple[Range, ...]
    step_: Callable[[Tensors, Tensor | None, Tensors, Tensors], None]
    slopes: Callable[[Tensors, Tensors, Tensors, Tensors, Tensors], Tensors]
    d_ranges: tuple[Range, ...]
    step_vjp_: Callable[[Tensor, Tensors, Tensors, Tensors, Tensors], None]
    d_x_ranges: tuple[Range, ...] = ()
    past: bool = False
    own_states: bool = True
    apart: bool = False


def tanh_step_(gates: Tensors, inner: Tensor | None, prev: Tensors, new: Tensors) -> None:
    torch.tanh_(gates[0])


def tanh_slopes(
    states: Tensors, prev: Tensors, saved: Tensors, d: Tensors, d_x: Tensors
) -> Tensors:
    torch.mul(states[0], states[0], out=d[0]).neg_().add_(1)
    return []


def tanh_step_vjp_(
    d_h: Tensor, d_states: Tensors, d: Tensors, d_x: Tensors, coefficients: Tensors
) -> None:
    d[0].mul_(d_h)


def relu_step_(gates: Tensors, inner: Tensor | None, prev: Tensors, new: Tensors) -> None:
    torch.relu_(gates[0])


def relu_slopes(
    states: Tensors, prev: Tensors, saved: Tensors, d: Tensors, d_x: Tensors
) -> Tensors:
    return [states[0] <= 0]


def relu_step_vjp_(
    d_h: Tensor, d_states: Tensors, d: Tensors, d_x: Tensors, coefficients: Tensors
) -> None:
    # Chosen, not multiplied: 0 times an infinite gradient is no 0.
    d[0].copy_(d_h).masked_fill_(coefficients[0], 0)


def gru_step_(gates: Tensors, inner: Tensor | None, prev: Tensors, new: Tensors) -> None:
    r_z, n, r, z = gates
    (h,) = new
    assert inner is not None
    torch.sigmoid_(r_z)
    n.addcmul_(r, inner).tanh_()
    torch.sub(prev[0], n, out=h)
    torch.addcmul(n, z, h, out=h)


def gru_slopes(states: Tensors, prev: Tensors, saved: Tensors, d: Tensors, d_x: Tensors) -> Tensors:
    r, z, n, m = saved
    d_r, d_z, d_m = d
    d_n, rest = d_x[2], 1 - z
    torch.mul(n, n, out=d_n).neg_().add_(1).mul_(rest)
    torch.mul(d_n, r, out=d_m)
    torch.mul(d_m, m, out=d_r).mul_(1 - r)
    torch.sub(prev[0], n, out=d_z).mul_(z).mul_(rest)
    return [z]


def gru_step_vjp_(
    d_h: Tensor, d_states: Tensors, d: Tensors, d_x: Tensors, coefficients: Tensors
) -> None:
    d[0].mul_(d_h[:, None])
    d_x[0].mul_(d_h)


def lstm_step_(gates: Tensors, inner: Tensor | None, prev: Tensors, new: Tensors) -> None:
    i_f, g, o, i, f = gates
    h, c = new
    torch.sigmoid_(i_f)
    torch.tanh_(g)
    torch.sigmoid_(o)
    torch.mul(f, prev[1], out=c).addcmul_(i, g)
    torch.tanh(c, out=h).mul_(o)


def lstm_slopes(
    states: Tensors, prev: Tensors, saved: Tensors, d: Tensors, d_x: Tensors
) -> Tensors:
    i, f, g, o = saved
    d_i, d_f, d_g, d_o = d
    tanh_c = torch.tanh(states[1])
    torch.mul(g, i, out=d_i).mul_(1 - i)
    torch.mul(prev[1], f, out=d_f).mul_(1 - f)
    torch.mul(g, g, out=d_g).neg_().add_(1).mul_(i)
    torch.mul(tanh_c, o, out=d_o).mul_(1 - o)
    return [tanh_c.mul_(tanh_c).neg_().add_(1).mul_(o), f]


def lstm_step_vjp_(
    d_h: Tensor, d_states: Tensors, d: Tensors, d_x: Tensors, coefficients: Tensors
) -> None:
    d_i_f_g, d_o = d
    c_by_h, f = coefficients
    d_c = d_states[0].addcmul_(d_h, c_by_h)
    d_i_f_g.mul_(d_c[:, None])
    d_o.mul_(d_h)
    d_c.mul_(f)


ELMAN = ((0, 1),)
IN_PLACE = {
    "rnn_tanh": InPlace(ELMAN, tanh_step_, tanh_slopes, ELMAN, tanh_step_vjp_, own_states=False),
    "rnn_relu": InPlace(ELMAN, relu_step_, relu_slopes, ELMAN, relu_step_vjp_, own_states=False),
    "gru": InPlace(
        ((0, 2), (2, 3), (0, 1), (1, 2)),
        gru_step_,
        gru_slopes,
        ((0, 3),),
        gru_step_vjp_,
        d_x_ranges=((2, 3),),
        past=True,
    ),
    "lstm": InPlace(
        ((0, 2), (2, 3), (3, 4), (0, 1), (1, 2)),
        lstm_step_,
        lstm_slopes,
        ((0, 3), (3, 4)),
        lstm_step_vjp_,
    ),
}


def by_step(cell: Cell, params: tuple[Tensor, ...]) -> InPlace:
    """The form of any cell: its own step and VJP on one step at a time. What the VJP of a derived
    cell computes whatever d_state is, it computes for all steps at once."""
    S = cell.states

    def step_(gates: Tensors, inner: Tensor | None, prev: Tensors, new: Tensors) -> None:
        assert inner is not None
        h_gates = inner.chunk(cell.gates, 1)
        state, saved = cell.step(tuple(gates), h_gates, tuple(prev), params)
        put((*state, *saved), new)

    def keep(states: Tensors, prev: Tensors, saved: Tensors, d: Tensors, d_x: Tensors) -> Tensors:
        one = states[0].new_ones(()).expand_as(states[0])
        if isinstance(cell, DerivedCell):
            return [*cell.slopes(tuple(prev), tuple(states), tuple(saved), params), one]
        return [*states, *prev, *saved, one]

    def step_vjp_(
        d_h: Tensor, d_states: Tensors, d: Tensors, d_x: Tensors, coefficients: Tensors
    ) -> None:
        d_state, known = (d_h, *d_states), tuple(coefficients[:-1])
        if isinstance(cell, DerivedCell):
            results = cell.times_slopes(d_state, known)
        else:
            state, prev, saved = known[:S], known[S : 2 * S], known[2 * S :]
            results = cell.step_vjp(d_state, prev, state, saved, params)
        d_x_gates, d_h_gates, d_prev, d_params = results
        put((*d_h_gates, *d_params[len(cell.inner_bias) :]), d)
        put(tuple(d_x_gates[k] for k in cell.split), d_x)
        if S > 1:  # one may be another one's old gradient
            d_prev = tuple(x if x is None else x.clone() for x in d_prev)
        put(d_prev, [d_h, *d_states])

    each = tuple((k, k + 1) for k in range(cell.gates))
    split = tuple((k, k + 1) for k in cell.split)
    return InPlace(each, step_, keep, each, step_vjp_, split, past=True, apart=True)


def put(results: tuple[Tensor | None, ...], places: Tensors) -> None:
    """Copy results where they belong; None is zero."""
    for x, place in zip(results, places, strict=True):
        if x is None:
            place.zero_()
        else:
            place.copy_(x)


def form_of(cell: Cell, params: tuple[Tensor, ...]) -> InPlace:
    """How the tuned PyTorch path runs a cell with these params."""
    return IN_PLACE.get(cell.name) or by_step(cell, params)
