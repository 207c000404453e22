"""A layer's two passes on each engine, with the matrix products around the loops.

    in torch   the tuned PyTorch path, direction by direction
    in triton  the fused kernels, all directions in one launch

x_gates = W_ih x + b_ih is one product over all steps before the loop; the gradients of the input
and of all weights are products over all steps after it (Werbos, 1990).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import torch_path
from .cells import CELLS, Cell, Tensors
from .dispatch import kernels
from .kernels.layout import Inputs, dense
from .kernels.limits import Plan
from .layer import Spec, Weights, split, time_major
from .regularisers import Regularisers, mask_of_rows
from .rows import Rows, active_steps, lengths_of, offsets_of


class Gradients(NamedTuple):
    """What an engine's backward pass leaves for the products after it, for each direction."""

    d_x_gates: list[Tensor]  # each (N, G * H)
    d_h_gates: list[Tensor]  # the same tensors where the two do not differ
    d_state0: Tensors  # (D, B, H) each
    d_weight_hh: list[Tensor]
    d_params: list[Tensors]  # in the order of Cell.params


class StepRows(NamedTuple):
    """The rows of the PyTorch path's gradients: those of step 0, then those of step 1, and so on,
    without padding."""

    spec: Spec
    rows: Rows

    def gather(self, x: Tensor) -> Tensor:
        """The layer's x, or what has its shape, as rows."""
        return x if self.spec.sizes is not None else self.rows.gather(time_major(self.spec, x))

    def scatter(self, rows: Tensor, like: Tensor) -> Tensor:
        """Rows in the shape of x, zero at padding."""
        if self.spec.sizes is not None:
            return rows
        if self.rows.steps is None and not self.spec.batch_first:
            return rows.view(*like.shape[:2], rows.size(1))
        x = rows.new_zeros(*like.shape[:2], rows.size(1))
        self.rows.scatter_(rows, time_major(self.spec, x))
        return x


class MemoryRows(NamedTuple):
    """The rows of the kernels' gradients: as x lies in memory, padding and all, which is zero."""

    spec: Spec
    lengths: Tensor | None

    def gather(self, x: Tensor) -> Tensor:
        if self.spec.sizes is not None:
            return x
        if self.lengths is not None:  # zero times what lies in the padding need not be zero
            active = active_steps(self.lengths, time_major(self.spec, x).size(0))[:, :, None]
            x = torch.where(time_major(self.spec, active), x, torch.zeros_like(x))
        return x.flatten(0, 1)

    def scatter(self, rows: Tensor, like: Tensor) -> Tensor:
        return rows.view(*like.shape[:-1], rows.size(1))


# The tuned PyTorch path.


def rows_of(spec: Spec, x: Tensor, lengths: Tensor | None, batch: int) -> Rows:
    if spec.sizes is not None:
        return Rows(list(spec.sizes), batch)
    T = x.size(1 if spec.batch_first else 0)
    return Rows.equal(T, batch) if lengths is None else Rows.of_lengths(lengths, T)


def forward_in_torch(
    spec: Spec, x: Tensor, lengths: Tensor | None, tensors: Tensors, save: bool
) -> tuple[Tensor, Tensors, Tensors]:
    """output, last states and, if `save`, what backward_in_torch takes as `kept`.

    The user's output is a copy of the states that are kept, so it may be changed in place.
    """
    cell = CELLS[spec.cell]
    state0, weights = split(spec, tensors)
    D, B, H = state0[0].shape
    rows = rows_of(spec, x, lengths, B)
    x_rows = StepRows(spec, rows).gather(x)
    regularisers = in_rows(spec, rows, tensors)
    outputs, last = [], []
    kept: list[Tensor] = []
    for d in range(D):
        if weights.weight_ih:
            x_gates = input_product(x_rows, weights.weight_ih[d], weights.bias(cell, d), rows.sizes)
        else:
            width = cell.gates * H
            x_gates = x_rows[:, d * width : (d + 1) * width].clone(
                memory_format=torch.contiguous_format
            )
        states, ends, saved = torch_path.forward(
            cell,
            x_gates,
            tuple(rows.sort(s[d]) for s in state0),
            weights.weight_hh[d],
            weights.params[d],
            rows.sizes,
            spec.reverse != bool(d),
            regularisers.of_direction(d, D),
        )
        outputs.append(states[0])
        last.append(tuple(rows.unsort(s) for s in ends))
        kept += (*states, *saved)
    output = placed(spec, rows, outputs, x, copy=save)
    return output, joined(spec, last), tuple(kept) if save else ()


def in_rows(spec: Spec, rows: Rows, tensors: Tensors) -> Regularisers:
    """The layer's regularisers in the order of the rows."""
    mask, keep, grad_clip = spec.regularisers(tensors)
    mask = None if mask is None else torch.stack([rows.sort(m) for m in mask])
    keep = None if keep is None else StepRows(spec, rows).gather(keep)
    return Regularisers(mask, keep, grad_clip)


def input_product(x_rows: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> Tensor:
    """x_gates of all rows: one product or, in float64, one for each step. How many rows a product
    has decides in which order it sums, and so its last bit: a sequence taken step by step is to
    have the bits of the whole."""
    if x_rows.dtype != torch.float64 or not sizes:
        return F.linear(x_rows, weight, bias)
    x_gates = x_rows.new_empty(len(x_rows), len(weight))
    aligned = torch_path.Aligned(max(sizes), x_rows)
    for x, gates in zip(x_rows.split(sizes), x_gates.split(sizes)):
        if bias is None:
            torch.mm(aligned(x), weight.t(), out=gates)
        else:
            torch.addmm(bias, aligned(x), weight.t(), out=gates)
    return x_gates


def placed(spec: Spec, rows: Rows, parts: list[Tensor], like: Tensor, copy: bool) -> Tensor:
    """The rows of all directions as the layer's output, laid out as its x; a tensor that is no
    view, so that it may be detached in place."""
    if spec.sizes is None and (spec.batch_first or rows.steps is not None):
        H = parts[0].size(1)
        output = parts[0].new_zeros(*like.shape[:2], len(parts) * H)
        for d, part in enumerate(parts):
            rows.scatter_(part, time_major(spec, output)[..., d * H : (d + 1) * H])
        return output
    if spec.sizes is None:
        parts = [part.view(*like.shape[:2], part.size(1)) for part in parts]
    if len(parts) > 1:
        return torch.cat(parts, -1)
    return parts[0].clone() if copy else own(parts[0])


def joined(spec: Spec, by_direction: list[Tensors]) -> Tensors:
    """The states of the directions, (B, H) each, in the layout of the caller's."""
    if not spec.stacked:
        return by_direction[0]
    return tuple(torch.stack(states) for states in zip(*by_direction))


def backward_in_torch(
    spec: Spec,
    x: Tensor,
    lengths: Tensor | None,
    tensors: Tensors,
    kept: Tensors,
    d_output: Tensor | None,
    d_last: tuple[Tensor | None, ...],  # S tensors (D, B, H)
) -> tuple[Gradients, StepRows]:
    cell = CELLS[spec.cell]
    state0, weights = split(spec, tensors)
    D, B, H = state0[0].shape
    rows = rows_of(spec, x, lengths, B)
    in_steps = StepRows(spec, rows)
    regularisers = in_rows(spec, rows, tensors)
    result = Gradients([], [], (), [], [])
    d_state0, each = [], len(kept) // D
    for d in range(D):
        states = kept[d * each : d * each + cell.states]
        saved = kept[d * each + cell.states : (d + 1) * each]
        mine = regularisers.of_direction(d, D)
        backwards = spec.reverse != bool(d)
        prev = tuple(
            torch_path.previous(s, rows.sort(s0[d]), rows.sizes, backwards)
            for s, s0 in zip(states, state0)
        )
        if d_output is None:
            d_h = torch.zeros_like(states[0])
        else:
            d_h = in_steps.gather(d_output[..., d * H : (d + 1) * H])
            if d_h.untyped_storage().data_ptr() == d_output.untyped_storage().data_ptr():
                d_h = d_h.clone(memory_format=torch.contiguous_format)  # it is written over
        d_x_gates, d_h_gates, d_first, d_own = torch_path.backward(
            cell,
            d_h,
            [None if s is None else rows.sort(s[d]) for s in d_last],
            saved[cell.saved :] if spec.zoneout else states,
            prev,
            saved[: cell.saved],
            weights.weight_hh[d],
            weights.params[d],
            B,
            rows.sizes,
            backwards,
            mine,
        )
        result.d_x_gates.append(d_x_gates)
        result.d_h_gates.append(d_h_gates)
        taken = prev[0]
        if mine.h_mask is not None:
            taken = taken * mask_of_rows(mine.h_mask, rows.sizes)
        result.d_weight_hh.append(d_h_gates.t() @ taken)
        result.d_params.append((*inner_gradients(cell, d_h_gates), *d_own))
        d_state0.append(tuple(rows.unsort(s) for s in d_first))
    return result._replace(d_state0=tuple(torch.stack(s) for s in zip(*d_state0))), in_steps


def inner_gradients(cell: Cell, d_h_gates: Tensor) -> Iterator[Tensor]:
    """Of the biases inside the step, from d_h_gates (N, G * H): each is added to its gate of
    W_hh h, and so has the gate's gradient."""
    gates = d_h_gates.chunk(cell.gates, 1)
    return (gates[k].sum(0) for k in cell.inner_bias)


# The fused kernels.


def in_steps_of(spec: Spec, x: Tensor) -> Tensor:
    """(T, B, F), or the packed rows as they are."""
    return x if spec.sizes is not None else time_major(spec, x)


def inputs_of(
    spec: Spec,
    steps: Tensor,
    lengths: Tensor | None,
    state0: Tensors,
    weights: Weights,
    regularisers: Regularisers,
) -> Inputs:
    """What the kernels read; `steps` are x_gates, or what lies in memory as they do."""
    h_mask, keep, grad_clip = regularisers
    keep = None if keep is None else dense(in_steps_of(spec, keep))
    offsets = None
    if spec.sizes is not None:
        lengths = lengths_of(spec.sizes, steps.device)
        offsets = offsets_of(spec.sizes, steps.device)
    weight_hh, params = torch.stack(weights.weight_hh), weights.stacked_params()
    each = steps, state0, weight_hh, params, lengths, offsets, spec.reverse
    return Inputs(*each, h_mask, keep, grad_clip)


def own(x: Tensor) -> Tensor:
    """The same memory as a tensor that is no view, so that it may be detached in place."""
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def forward_in_triton(
    plan: Plan, spec: Spec, x: Tensor, lengths: Tensor | None, tensors: Tensors, save: bool
) -> tuple[Tensor, Tensors, Tensors]:
    """output, last states and, if `save`, what backward_in_triton takes beside the output."""
    state0, weights = split(spec, tensors)
    cell = spec.stored_cell
    x_gates = in_steps_of(spec, weights.x_gates(cell, x))
    inputs = inputs_of(spec, x_gates, lengths, state0, weights, spec.regularisers(tensors))
    output, state_n, stored = kernels.forward(plan, cell, inputs, save)
    if spec.batch_first:
        output = own(output.transpose(0, 1))
    if not spec.stacked:
        state_n = tuple(own(s.squeeze(0)) for s in state_n)
    return output, state_n, () if stored is None else (stored,)


def backward_in_triton(
    plan: Plan,
    spec: Spec,
    lengths: Tensor | None,
    tensors: Tensors,
    kept: Tensors,  # output, and what the cell stores beside it
    d_output: Tensor | None,
    d_last: tuple[Tensor | None, ...],
    need_d_gates: bool,
    need_d_state0: bool,
    need_d_own: bool,  # of the cell's own params
) -> Gradients:
    cell, regularisers = spec.stored_cell, spec.regularisers(tensors)
    state0, weights = split(spec, tensors)
    D, _, H = state0[0].shape
    sizes = spec.sizes
    output, stored = kept if cell.stored else (kept[0], None)
    steps = in_steps_of(spec, output)
    inputs = inputs_of(spec, steps, lengths, state0, weights, regularisers)
    if d_output is not None:
        d_output = in_steps_of(spec, d_output)
    need = need_d_gates, need_d_state0, need_d_own
    d_x_gates, d_h_gates, d_state0, d_params = kernels.backward(
        plan, cell, inputs, steps, stored, d_output, d_last, *need
    )
    d_own = (d_params or ())[len(cell.inner_bias) :]
    result = Gradients([], [], d_state0 or (), [], [])
    if d_x_gates is None or d_h_gates is None:
        return result
    width = cell.gates * H
    for d in range(D):
        mine = slice(d * width, (d + 1) * width)
        d_h = d_h_gates[..., mine]
        h, h0 = steps[..., d * H : (d + 1) * H], state0[0][d]
        backwards = spec.reverse != bool(d)
        h_mask = None if regularisers.h_mask is None else regularisers.h_mask[d]
        if sizes is not None:
            prev = torch_path.previous(h, h0, sizes, backwards)
            if h_mask is not None:
                prev = prev * mask_of_rows(h_mask, sizes)
            result.d_weight_hh.append(d_h.t() @ prev)
        else:
            if h_mask is not None:
                h, h0 = h * h_mask, h0 * h_mask
            result.d_weight_hh.append(recurrent_weight_gradient(d_h, h, h0, lengths, backwards))
        result.d_x_gates.append(flat(spec, d_x_gates)[:, mine])
        same = d_h_gates is d_x_gates
        result.d_h_gates.append(result.d_x_gates[-1] if same else flat(spec, d_h_gates)[:, mine])
        inner = inner_gradients(cell, result.d_h_gates[-1])
        result.d_params.append((*inner, *(own[d] for own in d_own)))
    return result


def flat(spec: Spec, steps: Tensor) -> Tensor:
    """(T, B, F) as rows in the order in which x lies in memory; packed rows as they are."""
    return steps if spec.sizes is not None else time_major(spec, steps).flatten(0, 1)


def recurrent_weight_gradient(
    d_h_gates: Tensor,  # (T, B, G * H), zero where a row is not active
    output: Tensor,  # (T, B, H), likewise
    h0: Tensor,  # (B, H)
    lengths: Tensor | None,  # (B,)
    backwards: bool,
) -> Tensor:
    """dW_hh (G * H, H): the sum over steps and rows of d_h_gates[t] times the state before t."""
    T, B, _ = output.shape
    if not backwards:
        first, after, before = d_h_gates[0], slice(1, None), slice(None, -1)
    else:
        first, after, before = d_h_gates[-1], slice(None, -1), slice(1, None)
    if lengths is not None:  # h0 comes before a row's own first step, if it has one
        h0 = torch.where((lengths > 0)[:, None], h0, torch.zeros_like(h0))
        if backwards:
            last = (lengths.to(torch.int64) - 1).clamp(0, T - 1)
            first = d_h_gates[last, torch.arange(B, device=last.device)]
    gradient = first.t() @ h0
    if T > 1:
        gradient = gradient + d_h_gates[after].flatten(0, 1).t() @ output[before].flatten(0, 1)
    return gradient
