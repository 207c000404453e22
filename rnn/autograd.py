"""A layer's place in autograd: one Function for every cell and both engines."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .cells import CELLS
from .engines import (
    Gradients,
    MemoryRows,
    StepRows,
    backward_in_torch,
    backward_in_triton,
    forward_in_torch,
    forward_in_triton,
)
from .kernels.limits import KernelUnavailable, NoPlan, Plan
from .layer import Spec, plain


class Call(NamedTuple):
    """How a layer is run: what autograd carries from the forward to the backward pass."""

    spec: Spec
    plan: Plan | NoPlan
    save: bool  # a backward pass may follow
    strict: bool = False  # backend="triton": raise where a kernel turns out not to compile


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Dtypes were settled before; a product that autocast changed would not fit its buffer."""
    if autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def autocast_enabled(device_type: str) -> bool:
    """torch.is_autocast_enabled, for meta too, which has no autocast. Dynamo of torch 2.11 cannot
    ask torch.amp.is_autocast_available."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


class Recurrence(torch.autograd.Function):
    """One layer over all steps and directions, on either engine.

    The outputs are output, the last states and, where a backward pass may follow, what the engine
    keeps for it, which is not differentiable. A second derivative is taken of the layer's
    equation, computed anew from what went in.
    """

    @staticmethod
    def forward(
        call: Call, x: Tensor, lengths: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        with without_autocast(x.device):
            if isinstance(call.plan, Plan):
                output, state_n, kept = forward_in_triton(
                    call.plan, call.spec, x, lengths, tensors, call.save
                )
            else:
                output, state_n, kept = forward_in_torch(call.spec, x, lengths, tensors, call.save)
        return output, *state_n, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, outputs: tuple[Tensor, ...]) -> None:
        call, x, lengths, *tensors = inputs
        if not call.save:
            return
        S = CELLS[call.spec.cell].states
        kept = outputs[1 + S :]
        ctx.mark_non_differentiable(*kept)
        if isinstance(call.plan, Plan):
            # Detached, so that what a hook keeps of it does not keep this graph alive.
            kept = (outputs[0].detach(), *kept)
        ctx.call, ctx.inputs = call, len(tensors)
        # The gradient of W_ih reads x. Where none is wanted a second derivative alone does: x may
        # be changed in place before a first one, and its version says whether it was.
        first = call.spec.first_weight
        weights = tensors[first :: len(tensors[first:]) // call.spec.directions]
        read = call.spec.input_product and any(w.requires_grad for w in weights)
        read = read or torch._C._are_functorch_transforms_active()
        ctx.x, ctx.version = (None, None) if read else (x, x._version)
        ctx.save_for_backward(x if read else None, lengths, *tensors, *kept)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple:
        call: Call = ctx.call
        x, lengths, *rest = ctx.saved_tensors
        x = ctx.x if x is None else x
        tensors, kept = tuple(rest[: ctx.inputs]), tuple(rest[ctx.inputs :])
        states = CELLS[call.spec.cell].states
        d_output, d_last = d_outputs[0], d_outputs[1 : 1 + states]
        if all(d is None for d in (d_output, *d_last)):
            return (None,) * (3 + len(tensors))
        every_operation_is_seen = (
            torch.is_grad_enabled()  # create_graph=True: a second order is wanted
            or torch._C._are_functorch_transforms_active()
            or any(is_batched(d) for d in d_outputs)
        )
        needs = ctx.needs_input_grad
        with without_autocast(x.device):
            if not every_operation_is_seen:
                try:
                    return None, *backward(call, x, lengths, tensors, kept, d_output, d_last, needs)
                except KernelUnavailable as error:
                    if call.strict:
                        raise
                    assert isinstance(call.plan, Plan)
                    dispatch.give_up(call.plan, error)
            if ctx.x is not None and x._version != ctx.version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an "
                    "inplace operation: the input of a recurrent layer, which a second derivative "
                    f"reads, is at version {x._version}; expected version {ctx.version} instead"
                )
            return None, *backward_of_plain(
                call.spec, x, lengths, tensors, needs, d_outputs[: 1 + states]
            )


def backward_of_plain(
    spec: Spec,
    x: Tensor,
    lengths: Tensor | None,
    tensors: tuple[Tensor, ...],
    needs: Sequence[bool],  # of the Function's inputs: call, x, lengths, *tensors
    d_outputs: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, lengths and tensors, by autograd through the layer's equation."""
    inputs = (x, *tensors)
    asked = [k for k, need in enumerate((needs[1], *needs[3:])) if need]
    given = [k for k, d in enumerate(d_outputs) if d is not None]

    def layer(*differentiated: Tensor) -> tuple[Tensor, ...]:
        each = list(inputs)
        for k, t in zip(asked, differentiated):
            each[k] = t
        outputs = plain(spec, each[0], lengths, *each[1:])
        return tuple(outputs[k] for k in given)

    at = [inputs[k] for k in asked]
    d_given = tuple(d_outputs[k] for k in given)
    if torch._C._are_functorch_transforms_active():
        found = torch.func.vjp(layer, *at)[1](d_given)
    else:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views, so that a tensor that goes in twice has two gradients. What torch.func.vjp
            # differentiated no longer asks for a gradient once its function has returned.
            at = [t.view_as(t) for t in at]
            at = [t if t.requires_grad else t.detach().requires_grad_() for t in at]
            found = torch.autograd.grad(
                layer(*at), at, d_given, create_graph=create_graph, allow_unused=True
            )
    gradients: list[Tensor | None] = [None] * len(inputs)
    for k, gradient in zip(asked, found):
        gradients[k] = gradient
    return gradients[0], None, *gradients[1:]


def is_batched(x: Tensor | None) -> bool:
    """Whether x stands for many, under vmap or torch.autograd.grad's is_grads_batched."""
    if x is None:
        return False
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(x) or functorch.is_legacy_batchedtensor(x)


def backward(
    call: Call,
    x: Tensor,
    lengths: Tensor | None,
    tensors: tuple[Tensor, ...],
    kept: tuple[Tensor, ...],
    d_output: Tensor | None,
    d_last: tuple[Tensor | None, ...],
    needs: Sequence[bool],  # of the Function's inputs: call, x, lengths, *tensors
) -> tuple[Tensor | None, ...]:
    """The gradients of x, lengths and tensors: the engine's loop, then the products over all
    steps. Each gradient has memory of its own."""
    spec, cell = call.spec, CELLS[call.spec.cell]
    S, masks = cell.states, spec.first_weight - cell.states
    if not spec.stacked:
        d_last = tuple(None if d is None else d.unsqueeze(0) for d in d_last)
    need_d_x, need_d_weights = needs[1], needs[3 + S + masks :]
    weights = tensors[S + masks :]
    per_direction = len(weights) // spec.directions
    own = per_direction - len(cell.own_params)  # where they begin in each direction
    found: Gradients
    rows: StepRows | MemoryRows
    if isinstance(call.plan, Plan):
        need_d_gates, need_d_state0 = need_d_x or any(need_d_weights), any(needs[3 : 3 + S])
        need_d_own = any(n for k, n in enumerate(need_d_weights) if k % per_direction >= own)
        found = backward_in_triton(
            call.plan,
            spec,
            lengths,
            tensors,
            kept,
            d_output,
            d_last,
            need_d_gates,
            need_d_state0,
            need_d_own,
        )
        rows = MemoryRows(spec, lengths)
    else:
        found, rows = backward_in_torch(spec, x, lengths, tensors, kept, d_output, d_last)
    d_state0: list[Tensor | None] = [None] * S
    if any(needs[3 : 3 + S]):
        d_state0 = [s if spec.stacked else s[0] for s in found.d_state0]
    d_x = None
    if need_d_x and spec.input_product:
        weight_ih = weights[::per_direction]
        d_rows = found.d_x_gates[0] @ weight_ih[0]
        for d in range(1, spec.directions):
            d_rows.addmm_(found.d_x_gates[d], weight_ih[d])
        d_x = rows.scatter(d_rows, x)
    elif need_d_x:
        parts = found.d_x_gates
        d_x = rows.scatter(parts[0] if len(parts) == 1 else torch.cat(parts, 1), x)
    if not any(need_d_weights):
        return d_x, None, *d_state0, *(None for _ in tensors[S:])
    d_weights: list[Tensor | None] = []
    x_rows = rows.gather(x) if spec.input_product else x
    for d in range(spec.directions):
        mine = need_d_weights[d * per_direction : (d + 1) * per_direction]
        if spec.input_product:
            d_weights.append(found.d_x_gates[d].t() @ x_rows if mine[0] else None)
            d_weights.append(found.d_weight_hh[d] if mine[1] else None)
            if spec.bias:
                d_weights.append(found.d_x_gates[d].sum(0) if mine[2] else None)
                d_weights.append(found.d_h_gates[d].sum(0) if mine[3] else None)
            d_own = found.d_params[d][len(cell.inner_bias) :]
            d_weights += [p if m else None for p, m in zip(d_own, mine[own:])]
        else:
            d_weights.append(found.d_weight_hh[d] if mine[0] else None)
            d_weights += [p if m else None for p, m in zip(found.d_params[d], mine[1:])]
    return d_x, None, *d_state0, *(None,) * masks, *d_weights
