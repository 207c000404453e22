"""The recurrence in pure PyTorch, and its hand-written back-propagation through time.

The CPU path, and the oracle of the tests. Any floating dtype, any device. A step is one matrix
product and one elementwise function, written into views of buffers that hold all steps; only
`output` is kept for the reverse pass, and autograd records nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.layout import empty_steps

aten = torch.ops.aten


class Cell(NamedTuple):
    """One cell, as data for the two loops below; beside `step` its vector-Jacobian product.

    step(gates, out) -> h                 gates = x_gates[t] + W_hh h, (B, H)
    step_vjp(d_h, h, out) -> d_gates      h as step returned it
    Both write into `out`, which may be the same memory as the first argument, or, where it is
    None, into a new tensor that autograd can differentiate.
    """

    gates: int
    step: Callable[[Tensor, Tensor | None], Tensor]
    step_vjp: Callable[[Tensor, Tensor, Tensor | None], Tensor]


def tanh_step(gates: Tensor, out: Tensor | None) -> Tensor:
    return torch.tanh(gates, out=out)


def tanh_step_vjp(d_h: Tensor, h: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return aten.tanh_backward(d_h, h)
    return aten.tanh_backward.grad_input(d_h, h, grad_input=out)


def relu_step(gates: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.relu(gates)
    return torch.clamp_min(gates, 0, out=out)


def relu_step_vjp(d_h: Tensor, h: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return aten.threshold_backward(d_h, h, 0)
    return aten.threshold_backward.grad_input(d_h, h, 0, grad_input=out)


CELLS = {
    "rnn_tanh": Cell(1, tanh_step, tanh_step_vjp),
    "rnn_relu": Cell(1, relu_step, relu_step_vjp),
}


def addmm_product(weight: Tensor) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The function (x, h, out) -> x + h @ weight.T, written into `out` unless that is None."""
    transposed = weight.t()

    def product(x: Tensor, h: Tensor, out: Tensor | None) -> Tensor:
        return torch.addmm(x, h, transposed, out=out)

    return product


def packed_product(weight: Tensor, batch: int) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The same, with W_hh packed once into the order in which oneDNN's kernels read it.

    The CPU's form of resident weights: the ordinary product packs them anew at every step. It
    always returns a new tensor.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), batch)
    linear = torch.ops.mkldnn._linear_pointwise.binary

    def product(x: Tensor, h: Tensor, out: Tensor | None) -> Tensor:
        return linear(h, x, packed, None, "add")

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


def recurrent_product(
    weight: Tensor, batch: int
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    return packed_product(weight, batch) if can_pack(weight, batch) else addmm_product(weight)


def active_steps(lengths: Tensor, T: int) -> Tensor:
    """(T, B, 1) bool: row b is active while t < lengths[b]."""
    return (torch.arange(T, device=lengths.device)[:, None] < lengths).unsqueeze(2)


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
    step = CELLS[cell].step
    active = None if lengths is None else active_steps(lengths, T)
    output = empty_steps(x_gates, D * H)
    h_n = torch.empty_like(h0, memory_format=torch.contiguous_format)
    for d, (x_gates_d, output_d) in enumerate(zip(x_gates.chunk(D, 2), output.chunk(D, 2))):
        product = recurrent_product(weight_hh[d], B)
        xs, ys = x_gates_d.unbind(0), output_d.unbind(0)
        h = h0[d]
        for t in order(T, reverse != bool(d)):
            y = step(product(xs[t], h, ys[t]), ys[t])
            h = y if active is None else torch.where(active[t], y, h)
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
    D, G_H, H = weight_hh.shape
    step_vjp = CELLS[cell].step_vjp
    active = None if lengths is None else active_steps(lengths, T)
    if d_output is not None and active is not None:
        d_output = d_output.masked_fill(~active, 0)
    zero = output.new_zeros(B, H)
    d_x_gates = None if differentiable else empty_steps(output, D * G_H)
    all_d_gates, all_d_h0 = [], []
    for d in range(D):
        weight = weight_hh[d].t()
        product = addmm_product(weight) if differentiable else recurrent_product(weight, B)
        ys = output.chunk(D, 2)[d].unbind(0)
        d_ys = [zero] * T if d_output is None else d_output.chunk(D, 2)[d].unbind(0)
        buffers = [None] * T if d_x_gates is None else d_x_gates.chunk(D, 2)[d].unbind(0)
        scratch = None if differentiable else torch.empty_like(zero)
        steps = order(T, reverse == bool(d))  # against the forward pass
        d_h = d_ys[steps[0]] if d_h_n is None else d_ys[steps[0]] + d_h_n[d]
        d_gates: list[Tensor] = [zero] * T
        for t, d_y in zip(steps, [*(d_ys[t] for t in steps[1:]), zero]):
            if active is None:
                d_gates[t] = step_vjp(d_h, ys[t], buffers[t])
            else:  # an inactive row passes no gradient to its gates and hands d_h on as it came
                d_gates[t] = step_vjp(d_h.masked_fill(~active[t], 0), ys[t], buffers[t])
                d_y = d_y + d_h.masked_fill(active[t], 0)
            if t != steps[-1] or need_d_h0:
                d_h = product(d_y, d_gates[t], scratch)
        all_d_gates.append(d_gates)
        all_d_h0.append(d_h)
    if d_x_gates is None:
        d_x_gates = torch.cat([torch.stack(d_gates) for d_gates in all_d_gates], 2)
    return d_x_gates, torch.stack(all_d_h0) if need_d_h0 else None
