"""The launchers: they allocate what a kernel writes, and launch it."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from . import faults
from .cells import tiles_of
from .hopper_plan import HopperPlan
from .layout import Inputs, dense, empty_steps, stride_arguments
from .limits import KernelUnavailable, Plan
from .plan import PortablePlan
from .portable_backward import backward_kernel
from .portable_forward import forward_kernel

PATIENCE = 1 << 22  # polls of a flag, each a trip to L2: some seconds, then the wait is given up
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)  # TRITON_INTERPRET=1
P = ParamSpec("P")
R = TypeVar("R")

unavailable: dict[Plan, str] = {}  # why the kernels of these plans cannot be had here


def available(plan: Plan) -> Plan:
    """This plan or, where its kernels cannot be had, the first that takes over from it and may be
    tried, with the reason."""
    while plan in unavailable and plan.otherwise is not None:
        plan = replace(plan.otherwise, why=unavailable[plan])
    return plan


def falling_back(run: Callable[Concatenate[Plan, P], R]) -> Callable[Concatenate[Plan, P], R]:
    """Where a kernel of the plan cannot be had, what takes over from it runs, with a warning."""

    @wraps(run)
    def run_available(plan: Plan, /, *args: P.args, **kwargs: P.kwargs) -> R:
        while True:
            plan = available(plan)
            try:
                return run(plan, *args, **kwargs)
            except KernelUnavailable as error:
                if plan.otherwise is None:
                    raise
                unavailable[plan] = str(error)
                warnings.warn(f"{error}; instead runs: {plan.otherwise}", stacklevel=2)

    return run_available


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@contextmanager
def compiled(what: str, plan: Plan) -> Iterator[None]:
    """Raise KernelUnavailable where this Triton or this device cannot take the planned kernel."""
    try:
        yield
    except (CompilationError, OutOfResources, PTXASError, RuntimeError) as error:
        # Of RuntimeErrors, the compiler's own and those of a cluster that does not fit the device:
        # others are the device's.
        expected = "PassManager::run failed", "cluster"
        if isinstance(error, RuntimeError) and not any(e in str(error) for e in expected):
            raise
        raise KernelUnavailable(
            f"Triton {triton.__version__} has no kernel for the {what} ({plan}): "
            f"{type(error).__name__}: {error}"
        ) from error


def tf32_parts(weight: Tensor, parts: int) -> Tensor:
    """W_hh as the kernels take it: (parts, *weight.shape), float32 as tf32, high part then low."""
    weight = weight.contiguous()
    if weight.dtype != torch.float32:
        return weight.unsqueeze(0)
    # As products.round_tf32: the sum gives every NaN a payload in the bits that stay, and what
    # would round up to infinity is cut off.
    bits = (weight + 0.0).view(torch.int32)
    bits = torch.where(weight.abs() < 3.401992901712019e38, bits + 0x1000, bits)
    high = (bits & -0x2000).view(torch.float32)
    return torch.stack([high, weight - high][:parts])


def launch(
    pass_name: str,  # "forward" or "backward"
    plan: Plan,
    cell: Any,
    inputs: Inputs,
    like: Tensor,  # a tensor with steps
    width: int,  # of what a row exchanges between slices
    **arguments: Any,
) -> None:
    """Launch a pass over all batch tiles, on the plan's engine."""
    _, B, H = inputs.state0[0].shape
    lengths, tile_cell = inputs.lengths, tiles_of(cell)
    arguments |= dict(
        T=like.size(0) if inputs.offsets is None else inputs.offsets.numel(),
        B=B,
        H=H,
        GATES=cell.gates,
        STORED=cell.stored,
        state0_ptrs=tuple(s.contiguous() for s in inputs.state0),
        param_ptrs=tuple(p.contiguous() for p in inputs.params),
        lengths_ptr=None if lengths is None else lengths.contiguous(),
        reverse=int(inputs.reverse),
        BLOCK_B=plan.block_b,
        APPROXIMATE=plan.approximate,
    )
    if pass_name == "forward":
        reads_h = tile_cell.reads_h or inputs.keep is not None
        arguments |= dict(STEP=tile_cell.step, READS_H=reads_h)
    else:
        arguments |= dict(STEP_VJP=tile_cell.step_vjp, RECALLS=tile_cell.recalls)
    what = f"{pass_name} pass of {cell.name}"
    if isinstance(plan, HopperPlan):
        launch_hopper(pass_name, plan, what, inputs, tile_cell.reads, arguments)
    else:
        assert isinstance(plan, PortablePlan)
        arguments["ACROSS"] = cell.across
        launch_portable(pass_name, plan, what, inputs, like, width, arguments)


def most_registers(num_warps: int) -> int:
    """All that a block may have: left to itself, ptxas spills a few for more blocks on an SM."""
    return min(255, 65536 // (32 * num_warps))


def launch_hopper(
    pass_name: str,
    plan: HopperPlan,
    what: str,
    inputs: Inputs,
    reads: tuple[int, ...],
    arguments: dict[str, Any],
) -> None:
    try:
        from . import hopper_backward, hopper_forward
    except (ImportError, AttributeError) as error:  # Gluon changes from one Triton to the next
        raise KernelUnavailable(f"Triton {triton.__version__}: {error}") from error
    if pass_name == "forward":
        how, kernel = plan.forward, hopper_forward.forward_kernel
        own: dict[str, Any] = dict(CHUNK=how.chunk)
    else:
        how, kernel = plan.backward, hopper_backward.backward_kernel
        own = dict(READS=reads)
    weight = tf32_parts(inputs.weight_hh, 1)[0]
    with on_device(weight), compiled(what, plan):
        kernel[plan.grid()](
            weight_hh_ptr=weight,
            BLOCK_S=how.block_s,
            CTAS=how.ctas,
            HELD=how.held,
            AHEAD=how.ahead,
            num_ctas=how.ctas,
            num_warps=how.num_warps,
            maxnreg=most_registers(how.num_warps),
            **own,
            **arguments,
        )


def launch_portable(
    pass_name: str,
    plan: PortablePlan,
    what: str,
    inputs: Inputs,
    like: Tensor,
    width: int,
    arguments: dict[str, Any],
) -> None:
    """With what the slices talk through, where there are several."""
    T, B, H = (arguments[name] for name in "TBH")
    exchange, flags, fault, number = None, None, None, 0
    if plan.slices > 1:
        fault, number = faults.new_launch(what, T, B, plan, like.device)
        exchange = like.new_empty(2, plan.directions, B, width)
        flags = like.new_zeros(plan.directions, plan.tiles, T, dtype=torch.int32)
        arguments["launch_cooperative_grid"] = True
    if plan.limits.matrix_unit != "mfma":
        arguments["maxnreg"] = most_registers(plan.num_warps)
    if pass_name == "forward":
        kernel: Any = forward_kernel
        own = dict(
            CHUNKS=plan.chunks(H), PIECES=plan.pieces, STACKED=plan.stacked, STEPS=plan.steps
        )
    else:
        kernel = backward_kernel
        columns = H if plan.slices == 1 else arguments["GATES"] * H
        own = dict(
            CHUNKS=plan.chunks(columns), PIECES=plan.pieces_backward, STEPS=plan.steps_backward
        )
    regularisers: dict[str, Any] = dict(
        h_mask_ptr=None if inputs.h_mask is None else inputs.h_mask.contiguous(),
        keep_ptr=inputs.keep,
    )
    if inputs.keep is None:
        regularisers |= dict(keep_stride_t=None, keep_stride_b=None)
    if pass_name == "backward":
        regularisers["grad_clip"] = inputs.grad_clip
    weight, offsets = tf32_parts(inputs.weight_hh, plan.parts), inputs.offsets
    with on_device(like), compiled(what, plan):
        for first_tile, grid in plan.grids():
            kernel[grid](
                weight_hh_ptr=weight,
                offsets_ptr=None if offsets is None else offsets.contiguous(),
                exchange_ptr=exchange,
                flags_ptr=flags,
                fault_ptr=fault,
                first_tile=first_tile,
                launch=number,
                patience=PATIENCE,
                BLOCK_S=plan.block_s,
                DIRECT=plan.direct and not INTERPRETED,  # by PTX
                PARTS=plan.parts,
                SLICES=plan.slices,
                CHUNK=plan.chunk,
                num_warps=plan.num_warps,
                num_stages=plan.num_stages,
                **own,
                **regularisers,
                **arguments,
            )


@falling_back
def forward(
    plan: Plan,
    cell: Any,  # has name, gates, states, stored, split, across, as the cells of the package
    inputs: Inputs,
    save: bool,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """Launch the forward loop.

    Returns output (T, B, D * H) in the memory order of x_gates, or packed as x_gates is; the last
    states, each (D, B, H); and what the backward pass needs besides, as output but D * K * H wide
    for the K of cell.stored: the states beside h, then what the cell's step saves. None if not
    save, or if it needs nothing. Inactive steps are zero in output, and unwritten in the last.
    """
    x_gates = dense(inputs.x_gates)
    D, _, H = inputs.state0[0].shape
    output = empty_steps(x_gates, D * H)
    stored = empty_steps(x_gates, D * cell.stored * H) if save and cell.stored else None
    state_n = tuple(
        torch.empty_like(s, memory_format=torch.contiguous_format) for s in inputs.state0
    )
    launch(
        "forward",
        plan,
        cell,
        inputs,
        x_gates,
        width=H,
        x_gates_ptr=x_gates,
        output_ptr=output,
        stored_ptr=stored,
        state_n_ptrs=state_n,
        **stride_arguments(
            x_gates=x_gates,
            output=output,
            stored=output if stored is None else stored,
            keep=inputs.keep,
        ),
    )
    return output, state_n, stored


@falling_back
def backward(
    plan: Plan,
    cell: Any,
    inputs: Inputs,  # as in the forward pass; x_gates is not looked at
    output: Tensor,  # as forward returned it, in whatever layout it comes back
    stored: Tensor | None,
    d_output: Tensor | None,
    d_state_n: tuple[Tensor | None, ...],
    need_d_x_gates: bool,
    need_d_state0: bool,
    need_d_params: bool,
) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
    """Launch the backward loop.

    Returns d_x_gates, like x_gates and zero at inactive steps; d_h_gates, the same tensor where
    the cell splits no gate; d_state0, each (D, B, H); d_params, each (D, H), summed in float32 in
    an order that is always the same. Each is None where it is not needed.
    """
    D, B, H = inputs.state0[0].shape
    output = dense(output)
    stored = None if stored is None else dense(stored)
    d_output = None if d_output is None else dense(d_output)
    d_x_gates = d_h_gates = d_state0 = partial_d_params = None
    if need_d_x_gates:
        d_x_gates = empty_steps(output, D * cell.gates * H)
        d_h_gates = empty_steps(output, D * cell.gates * H) if cell.split else d_x_gates
    if need_d_state0:
        d_state0 = tuple(output.new_empty(D, B, H) for _ in inputs.state0)
    if need_d_params and inputs.params:
        shape = len(inputs.params), plan.tiles, D, H
        partial_d_params = output.new_empty(shape, dtype=torch.float32)
    launch(
        "backward",
        plan,
        cell,
        inputs,
        output,
        width=cell.gates * H,
        d_output_ptr=d_output,
        d_state_n_ptrs=tuple(None if d is None else d.contiguous() for d in d_state_n),
        output_ptr=output,
        stored_ptr=stored,
        d_x_gates_ptr=d_x_gates,
        d_h_gates_ptr=d_h_gates if cell.split else None,
        d_state0_ptrs=d_state0 or (None,) * len(inputs.state0),
        d_params_ptr=partial_d_params,
        **stride_arguments(
            x_gates=output if d_x_gates is None else d_x_gates,
            output=output,
            stored=output if stored is None else stored,
            d_output=output if d_output is None else d_output,
            keep=inputs.keep,
        ),
    )
    if not need_d_params:
        return d_x_gates, d_h_gates, d_state0, None
    sums = () if partial_d_params is None else partial_d_params.sum(1)
    d_params = tuple(d.to(p.dtype) for d, p in zip(sums, inputs.params))
    return d_x_gates, d_h_gates, d_state0, d_params
