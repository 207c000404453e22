"""The recurrence in pure PyTorch, and its hand-written back-propagation through time.

The CPU path, and the oracle of the tests. Any floating dtype, any device. A step is one matrix
product and one elementwise function, written into views of buffers that hold all steps; only
`output` is kept for the reverse pass, and autograd records nothing.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.layout import empty_steps

ONE = torch.ones(())


class Cell(NamedTuple):
    """One cell, as data for the two loops below.

    activate_(y) turns the gates of a step, times `scale`, into h, in place. slopes(output) is the
    derivative of h by the gates, for all steps at once: it depends on nothing that the reverse
    loop computes.
    """

    gates: int
    scale: float
    activate_: Callable[[Tensor], Tensor]
    slopes: Callable[[Tensor], Tensor]


def tanh_by_sigmoid_(y: Tensor) -> Tensor:
    """tanh(a) = 1 - 2 sigmoid(-2a), for y = -2a. PyTorch's sigmoid takes a quarter of the time of
    its tanh; the error stays below 2e-7, but is absolute, not relative."""
    return torch.add(ONE, torch.sigmoid_(y), alpha=-2, out=y)


def tanh_slopes(output: Tensor) -> Tensor:
    return torch.addcmul(output.new_ones(()), output, output, value=-1)


def relu_slopes(output: Tensor) -> Tensor:
    return (output > 0).to(output.dtype)


CELLS = {
    "rnn_tanh": Cell(1, 1.0, torch.tanh_, tanh_slopes),
    "rnn_relu": Cell(1, 1.0, torch.relu_, relu_slopes),
}
RNN_TANH_FLOAT32 = Cell(1, -2.0, tanh_by_sigmoid_, tanh_slopes)
MANY = 1024  # elements of a step from which on one call more is cheaper than PyTorch's tanh


def find_cell(name: str, h: Tensor) -> Cell:
    """The cell for states of this dtype and size, (B, H)."""
    if name == "rnn_tanh" and h.dtype == torch.float32 and h.numel() >= MANY:
        return RNN_TANH_FLOAT32
    return CELLS[name]


Product = Callable[[Tensor, Tensor, bool], Tensor]


def addmm_product(weight: Tensor) -> Product:
    """The function (x, h, in_place) -> x + h @ weight.T, written over x if in_place."""
    transposed = weight.t()

    def product(x: Tensor, h: Tensor, in_place: bool) -> Tensor:
        return x.addmm_(h, transposed) if in_place else torch.addmm(x, h, transposed)

    return product


def packed_product(weight: Tensor, batch: int) -> Product:
    """The same, with W_hh packed once into the order in which oneDNN's kernels read it.

    The CPU's form of resident weights: the ordinary product packs them anew at every step.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), batch)
    linear = torch.ops.mkldnn._linear_pointwise.binary

    def product(x: Tensor, h: Tensor, in_place: bool) -> Tensor:
        result = linear(h, x, packed, None, "add")
        return x.copy_(result) if in_place else result

    return product


def can_pack(weight: Tensor, batch: int) -> bool:
    """Whether packing pays: a call to oneDNN costs some 15 us more than addmm, and is worth it
    where W_hh (1 MiB and up) outgrows the nearest cache. The two ops are private to PyTorch."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() >= 1 << 18
        and batch >= 4
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def recurrent_product(weight: Tensor, batch: int) -> Product:
    return packed_product(weight, batch) if can_pack(weight, batch) else addmm_product(weight)


def active_steps(lengths: Tensor, T: int) -> Tensor:
    """(T, B, 1) bool: row b is active while t < lengths[b]."""
    return (torch.arange(T, device=lengths.device)[:, None] < lengths).unsqueeze(2)


def at_last_step(steps: Tensor, lengths: Tensor, without: Tensor) -> Tensor:
    """(B, _): each row of steps (T, B, _) at its last active step; `without` (B, _) where it has
    none."""
    last = (lengths.to(torch.int64) - 1).clamp(0, steps.size(0) - 1)
    found = steps.gather(0, last[None, :, None].expand(1, *steps.shape[1:]))[0]
    return torch.where((lengths > 0)[:, None], found, without)


def by_direction(steps: Tensor, D: int) -> Sequence[Tensor]:
    """(T, B, D * _) as D times (T, B, _), side by side."""
    return (steps,) if D == 1 else steps.chunk(D, 2)


def order(T: int, backwards: bool) -> range:
    return range(T - 1, -1, -1) if backwards else range(T)


def forward(
    cell: str,
    x_gates: Tensor,  # (T, B, D * G * H)
    h0: Tensor,  # (D, B, H)
    weight_hh: Tensor,  # (D, G * H, H)
    lengths: Tensor | None,  # (B,)
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """output (T, B, D * H) and h_n (D, B, H); direction 0 runs backwards in time if `reverse`,
    direction 1 against direction 0."""
    T, B, _ = x_gates.shape
    D, _, H = weight_hh.shape
    _, scale, activate_, _ = find_cell(cell, h0[0])
    active = None if lengths is None else active_steps(lengths, T)
    output = torch.mul(x_gates, scale, out=empty_steps(x_gates, D * H))
    h_n = torch.empty_like(h0, memory_format=torch.contiguous_format)
    for d, output_d in enumerate(by_direction(output, D)):
        weight = weight_hh[d] if scale == 1 else scale * weight_hh[d]
        product = recurrent_product(weight, B)
        ys = output_d.unbind(0)
        h, backwards = h0[d], reverse != bool(d)
        if active is None or not backwards:
            # A row that has ended runs on, on whatever lies behind its end: no result is of there.
            for t in order(T, backwards):
                h = activate_(product(ys[t], h, True))
        else:  # where a row begins, its state is still h0
            for t, on in zip(order(T, True), reversed(active.unbind(0))):
                h = torch.where(on, activate_(product(ys[t], h, True)), h)
        if lengths is not None and not backwards:
            h = at_last_step(output_d, lengths, h0[d])
        h_n[d] = h
    if active is not None:
        output.masked_fill_(~active, 0)
    return output, h_n


def reverse(
    cell: str,
    d_output: Tensor | None,  # (T, B, D * H)
    d_h_n: Tensor | None,  # (D, B, H)
    output: Tensor,  # (T, B, D * H), as forward returned it
    weight_hh: Tensor,  # (D, G * H, H)
    lengths: Tensor | None,  # (B,)
    reverse: bool,
    need_d_h0: bool,
    differentiable: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """d_x_gates (T, B, D * G * H) and d_h0 (D, B, H).

    differentiable: write nothing in place, so that autograd can take the derivative of this
    derivative; it needs the memory and the time of an ordinary autograd graph.
    """
    T, B, _ = output.shape
    D, _, H = weight_hh.shape
    slopes = find_cell(cell, output[0]).slopes(output)
    active = None if lengths is None else active_steps(lengths, T)
    if active is not None:  # an inactive row passes no gradient to its gates
        slopes.masked_fill_(~active, 0)
        d_output = None if d_output is None else d_output.masked_fill(~active, 0)
    zero = output.new_zeros(B, H)
    all_d_gates, all_d_h0 = [], []
    for d in range(D):
        weight = weight_hh[d].t()
        product = addmm_product(weight) if differentiable else recurrent_product(weight, B)
        slopes_d = by_direction(slopes, D)[d]
        d_output_d = None if d_output is None else by_direction(d_output, D)[d]
        backwards = reverse != bool(d)
        steps = order(T, not backwards)  # against the forward pass
        d_last = None if d_h_n is None else d_h_n[d]
        if lengths is not None and not backwards and d_last is not None:
            # Each row ends at a step of its own: there d_h_n joins d_output.
            base = torch.zeros_like(slopes_d) if d_output_d is None else d_output_d
            ends = active_steps(lengths, T) & ~active_steps(lengths.clamp(max=T) - 1, T)
            d_output_d, d_last = torch.where(ends, base + d_last, base), None
        d_ys = [zero] * T if d_output_d is None else d_output_d.unbind(0)
        d_gates = list(slopes_d.unbind(0))
        d_h = d_ys[steps[0]] if d_last is None else d_ys[steps[0]] + d_last
        for t, d_y in zip(steps, [*(d_ys[t] for t in steps[1:]), zero]):
            slope = d_gates[t]
            d_gates[t] = torch.mul(d_h, slope, out=None if differentiable else slope)
            if t != steps[-1]:
                d_h = product(d_y, d_gates[t], False)
        d_gates_d = torch.stack(d_gates) if differentiable else slopes_d  # written over its slopes
        all_d_gates.append(d_gates_d)
        if need_d_h0:
            first = d_gates[steps[-1]]
            if lengths is not None and backwards:
                first = at_last_step(d_gates_d, lengths, zero)
            d_h0 = product(zero, first, False)
            if lengths is not None and d_h_n is not None:  # a row without steps hands it on
                d_h0 = torch.where((lengths > 0)[:, None], d_h0, d_h_n[d])
            all_d_h0.append(d_h0)
    d_x_gates = torch.cat(all_d_gates, 2) if differentiable else slopes
    return d_x_gates, torch.stack(all_d_h0) if need_d_h0 else None
