"""One layer: what a call says, its weights, and the layer as its equation."""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .cells import CELLS, Cell, Tensors
from .operators import Stack, run_stack
from .regularisers import Regularisers
from .rows import active_steps, lengths_of


class Spec(NamedTuple):
    """What a layer's call says beside its tensors."""

    cell: str
    directions: int
    reverse: bool = False
    batch_first: bool = False  # x and output are (B, T, _)
    sizes: tuple[int, ...] | None = None  # x and output are packed, (N, _): batch_sizes
    input_product: bool = True  # False: x is x_gates
    bias: bool = True
    stacked: bool = True  # states are (D, B, H); False, of one direction: (B, H)
    projected: bool = False  # h is projected, for which PyTorch's own operator alone has weights
    h_mask: bool = False  # of the tensors, one after the states is the mask of recurrent dropout
    zoneout: bool = False  # and one is what each state keeps of its old value
    grad_clip: float | None = None

    @property
    def first_weight(self) -> int:
        """Where the weights begin among the layer's tensors: states, masks, weights."""
        return CELLS[self.cell].states + self.h_mask + self.zoneout

    @property
    def regularised(self) -> bool:
        return self.h_mask or self.zoneout or self.grad_clip is not None

    @property
    def stored_cell(self) -> Cell:
        """The cell with what the loop saves: under zoneout also the states as the step made them,
        before any kept its old value."""
        cell = CELLS[self.cell]
        return replace(cell, saved=cell.saved + cell.states) if self.zoneout else cell

    def regularisers(self, tensors: Tensors) -> Regularisers:
        """Those of the layer, from its tensors; `keep` lies as its x does."""
        masks = iter(tensors[CELLS[self.cell].states : self.first_weight])
        h_mask = next(masks) if self.h_mask else None
        return Regularisers(h_mask, next(masks) if self.zoneout else None, self.grad_clip)


class Weights(NamedTuple):
    """The weights of a layer, one of each for each direction; an empty tuple where it has none."""

    weight_ih: Tensors
    weight_hh: Tensors
    bias_ih: Tensors
    bias_hh: Tensors
    params: tuple[Tensors, ...]  # of each direction, in the order of Cell.params

    @classmethod
    def of(cls, spec: Spec, tensors: Tensors) -> "Weights":
        """From the flat order of torch.nn: W_ih, W_hh, b_ih, b_hh of each direction, then the
        cell's own params; without an input product, W_hh and all of the cell's params."""
        step = len(tensors) // spec.directions
        each = [tensors[d * step : (d + 1) * step] for d in range(spec.directions)]
        if not spec.input_product:
            return cls((), tuple(w[0] for w in each), (), (), tuple(w[1:] for w in each))
        weight_ih, weight_hh, *rest = zip(*each)
        bias_ih, bias_hh = rest[:2] if spec.bias else ((), ())
        cell, H = CELLS[spec.cell], weight_hh[0].size(1)
        own = step - len(cell.own_params)
        params = []
        for d in range(spec.directions):
            b = bias_hh[d] if spec.bias else weight_hh[d].new_zeros(cell.gates * H)
            inner = (b[k * H : (k + 1) * H] for k in cell.inner_bias)
            params.append((*inner, *each[d][own:]))
        return cls(weight_ih, weight_hh, bias_ih, bias_hh, tuple(params))

    def bias(self, cell: Cell, d: int) -> Tensor | None:
        """b_ih + b_hh of one direction, without what stands inside the step."""
        if not self.bias_ih:
            return None
        H = self.weight_hh[d].size(1)
        parts = list(self.bias_hh[d].split(H))
        for k in cell.inner_bias:
            parts[k] = torch.zeros_like(parts[k])
        return self.bias_ih[d] + (torch.cat(parts) if cell.inner_bias else self.bias_hh[d])

    def x_gates(self, cell: Cell, x: Tensor) -> Tensor:
        """(..., D * G * H) of all directions."""
        if not self.weight_ih:
            return x
        D = len(self.weight_ih)
        if D == 1:
            return F.linear(x, self.weight_ih[0], self.bias(cell, 0))
        biases = [b for d in range(D) if (b := self.bias(cell, d)) is not None]
        return F.linear(x, torch.cat(self.weight_ih), torch.cat(biases) if biases else None)

    def stacked_params(self) -> Tensors:
        return tuple(torch.stack(p) for p in zip(*self.params))


def split(spec: Spec, tensors: Tensors) -> tuple[Tensors, Weights]:
    """The states (D, B, H) and the weights of a layer's flat tensors."""
    S = CELLS[spec.cell].states
    state0 = tensors[:S] if spec.stacked else tuple(s.unsqueeze(0) for s in tensors[:S])
    return state0, Weights.of(spec, tensors[spec.first_weight :])


def time_major(spec: Spec, x: Tensor) -> Tensor:
    return x.transpose(0, 1) if spec.batch_first else x


def by_operator(
    spec: Spec, x: Tensor, lengths: Tensor | None, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """The layer by PyTorch's own operator, on x as it is and with the states stacked."""
    S = CELLS[spec.cell].states
    stack = Stack(spec.cell, spec.bias, 1, 0.0, True, spec.directions == 2, spec.batch_first)
    sizes = None if spec.sizes is None else torch.tensor(spec.sizes, device="cpu")
    output, state_n = run_stack(stack, x, sizes, lengths, tensors[:S], list(tensors[S:]))
    return output, *state_n


def plain(spec: Spec, x: Tensor, lengths: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The layer by PyTorch's differentiable operations: output and the last states."""
    if spec.projected:
        return by_operator(spec, x, lengths, *tensors)
    cell = CELLS[spec.cell]
    state0, weights = split(spec, tensors)
    regularisers = spec.regularisers(tensors)
    keep = regularisers.keep
    if spec.sizes is not None:
        B, T = state0[0].size(1), len(spec.sizes)
        lengths = lengths_of(spec.sizes, x.device)
        steps, sequences = active_steps(lengths, T).nonzero(as_tuple=True)
        x = x.new_zeros(T, B, x.size(1)).index_put((steps, sequences), x)
        if keep is not None:
            keep = keep.new_zeros(T, B, keep.size(1)).index_put((steps, sequences), keep)
    else:
        x = time_major(spec, x)
        keep = None if keep is None else time_major(spec, keep)
        if lengths is not None:  # padding may hold anything
            x = torch.where(active_steps(lengths, x.size(0))[:, :, None], x, torch.zeros_like(x))
    output, state_n = reference.recurrence(
        spec.cell,
        weights.x_gates(cell, x),
        state0,
        torch.stack(weights.weight_hh),
        weights.stacked_params(),
        lengths,
        spec.reverse,
        regularisers._replace(keep=keep),
    )
    output = output[steps, sequences] if spec.sizes is not None else time_major(spec, output)
    return output, *(state_n if spec.stacked else (s.squeeze(0) for s in state_n))
