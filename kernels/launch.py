"""The launchers: they allocate what a kernel writes, and launch it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from . import faults
from .cells import CELLS
from .layout import empty_steps, stride_arguments
from .plan import Plan
from .recurrence import forward_kernel, reverse_kernel

PATIENCE = 1 << 22  # polls of a flag, each a trip to L2: some seconds, then the wait is given up
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)  # TRITON_INTERPRET=1


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def tf32_parts(weight: Tensor, parts: int) -> Tensor:
    """W_hh as the kernels take it: (parts, *weight.shape), float32 as tf32, high part then low."""
    if weight.dtype != torch.float32:
        return weight.contiguous().unsqueeze(0)
    weight = weight.contiguous()
    high = ((weight.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return torch.stack([high, weight - high][:parts])


def launch(
    kernel: Any, plan: Plan, what: str, like: Tensor, T: int, B: int, width: int, **arguments: Any
) -> None:
    """Launch a kernel over all batch tiles; sliced, with what the slices talk through."""
    exchange, flags, fault, number = None, None, None, 0
    if plan.slices > 1:
        fault, number = faults.new_launch(what, T, B, plan, like.device)
        exchange = like.new_empty(2, plan.directions, B, width)
        flags = like.new_zeros(plan.directions, plan.tiles, T, dtype=torch.int32)
        arguments["launch_cooperative_grid"] = True
    with on_device(like):
        for first_tile, grid in plan.grids():
            kernel[grid](
                exchange_ptr=exchange,
                flags_ptr=flags,
                fault_ptr=fault,
                T=T,
                B=B,
                first_tile=first_tile,
                launch=number,
                patience=PATIENCE,
                BLOCK_H=plan.block_h,
                BLOCK_B=plan.block_b,
                PARTS=plan.parts,
                SLICES=plan.slices,
                CHUNKS=plan.chunks,
                num_warps=plan.num_warps,
                num_stages=plan.num_stages,
                **arguments,
            )


def forward(
    plan: Plan,
    cell: str,
    x_gates: Tensor,  # (T, B, D * G * H)
    h0: Tensor,  # (D, B, H)
    weight_hh: Tensor,  # (D, G * H, H)
    lengths: Tensor | None,  # (B,)
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the forward loop; returns output (T, B, D * H) and h_n (D, B, H)."""
    T, B, _ = x_gates.shape
    D, _, H = h0.shape
    if x_gates.stride(2) != 1:
        x_gates = x_gates.contiguous()
    output = empty_steps(x_gates, D * H)
    h_n = h0.new_empty(D, B, H)
    launch(
        forward_kernel,
        plan,
        f"forward pass of {cell}",
        x_gates,
        T,
        B,
        H,
        x_gates_ptr=x_gates,
        h0_ptr=h0.contiguous(),
        weight_hh_ptr=tf32_parts(weight_hh, plan.parts),
        lengths_ptr=None if lengths is None else lengths.contiguous(),
        output_ptr=output,
        h_n_ptr=h_n,
        reverse=int(reverse),
        **stride_arguments(x_gates=x_gates, output=output),
        H=H,
        GATES=CELLS[cell].gates,
        STEP=CELLS[cell].step_approx if plan.approximate else CELLS[cell].step,
    )
    return output, h_n


def reverse(
    plan: Plan,
    cell: str,
    d_output: Tensor | None,  # (T, B, D * H)
    d_h_n: Tensor | None,  # (D, B, H)
    output: Tensor,  # (T, B, D * H), as forward returned it
    weight_hh: Tensor,  # (D, G * H, H)
    lengths: Tensor | None,  # (B,)
    reverse: bool,
    need_d_x_gates: bool,
    need_d_h0: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Launch the reverse loop; returns d_x_gates (T, B, D * G * H) and d_h0 (D, B, H)."""
    T, B, _ = output.shape
    D, _, H = weight_hh.shape
    gates = CELLS[cell].gates
    if d_output is not None and d_output.stride(2) != 1:
        d_output = d_output.contiguous()
    d_x_gates = empty_steps(output, D * gates * H) if need_d_x_gates else None
    d_h0 = output.new_empty(D, B, H) if need_d_h0 else None
    launch(
        reverse_kernel,
        plan,
        f"reverse pass of {cell}",
        output,
        T,
        B,
        gates * H,
        d_output_ptr=d_output,
        d_h_n_ptr=None if d_h_n is None else d_h_n.contiguous(),
        output_ptr=output,
        weight_hh_ptr=tf32_parts(weight_hh, plan.parts),
        lengths_ptr=None if lengths is None else lengths.contiguous(),
        d_x_gates_ptr=d_x_gates,
        d_h0_ptr=d_h0,
        reverse=int(reverse),
        **stride_arguments(d_output=output if d_output is None else d_output, output=output),
        H=H,
        GATES=gates,
        STEP_VJP=CELLS[cell].step_vjp,
    )
    return d_x_gates, d_h0
