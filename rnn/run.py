"""Which way a layer runs: as its equation, as one op of a compiled graph, or on an engine."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from . import dispatch, ops
from .autograd import Call, Recurrence
from .cells import CELLS
from .kernels.limits import KernelUnavailable, Plan
from .layer import Spec, plain
from .layer_norm import NormedCell, with_x_gates


def values_are_hidden(tensors: Sequence[Any]) -> bool:
    """Whether values must not be looked at: under a tracer of graphs or a transform of torch.func
    other than grad, or where tensors hold no data."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    if torch._C._are_functorch_transforms_active() and under_other_transforms_than_grad():
        return True
    return any(isinstance(x, Tensor) and (x.is_meta or isinstance(x, FakeTensor)) for x in tensors)


def needs_plain_operations(tensors: Sequence[Any]) -> bool:
    """Whether every operation must be seen: where values are hidden, and in forward mode."""
    if values_are_hidden(tensors):
        return True
    return forward_ad._current_level >= 0 and any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    )


def under_other_transforms_than_grad() -> bool:
    grad = torch._C._functorch.TransformType.Grad
    return any(i.key() != grad for i in torch._C._functorch.get_interpreter_stack() or ())


def transformed() -> bool:
    """Whether torch.func or forward-mode derivatives are at work: a layer that is traced is then
    its equation, and no op."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def run(
    spec: Spec,
    backend: str,
    x: Tensor,
    lengths: Tensor | None,
    tensors: tuple[Tensor, ...],
    batch_sizes: Tensor | None = None,  # of packed x in a graph, in place of spec.sizes
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A layer on tensors that were checked before: output and the last states."""
    if spec.input_product and isinstance(CELLS[spec.cell], NormedCell):
        spec, x, tensors = with_x_gates(spec, x, lengths, tensors)
    cell, S = spec.stored_cell, CELLS[spec.cell].states
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors))
    if torch.compiler.is_compiling() and not transformed():
        return ops.run_as_op(spec, backend, x, lengths, batch_sizes, tensors, save)
    hidden, batch = tensors[0].size(-1), tensors[0].size(-2)
    how = spec.directions, x.dtype, x.device, spec.sizes is not None, spec.regularised
    plan = dispatch.choose(backend, cell, hidden, batch, *how)
    if needs_plain_operations((x, *tensors)):
        if backend == "triton":
            raise RuntimeError(
                'backend="triton" cannot run under vmap, forward-mode derivatives, tracing or on '
                'tensors without data: PyTorch\'s own operations can (backend="auto")'
            )
        output, *state_n = plain(spec, x, lengths, *tensors)
        return output, tuple(state_n)
    call = Call(spec, plan, save, strict=backend == "triton")
    try:
        return _apply(call, S, x, lengths, tensors)
    except KernelUnavailable as error:
        if call.strict:
            raise
        assert isinstance(plan, Plan)
        call = call._replace(plan=dispatch.give_up(plan, error))
        return _apply(call, S, x, lengths, tensors)


def _apply(
    call: Call, states: int, x: Tensor, lengths: Tensor | None, tensors: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    # apply as C++ has it: Python's binds the signature anew at each call, some 50 us, in which a
    # CPU takes several steps of a small layer. torch.func has need of Python's.
    if torch._C._are_functorch_transforms_active():
        results = Recurrence.apply(call, x, lengths, *tensors)
    else:
        results = super(torch.autograd.Function, Recurrence).apply(call, x, lengths, *tensors)
    return results[0], tuple(results[1 : 1 + states])
