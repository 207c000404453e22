"""The two loops over time, one for each direction of differentiation, and their launchers.

    forward_kernel   state = STEP(x_gates[t], W_hh h, state)            t in processing order
    reverse_kernel   back-propagation through time (Werbos, 1990)       t in the opposite order

One program owns BLOCK_B rows of the batch, in one direction of the layer, for all T steps. It reads
W_hh from device memory once, before the loop. In the loop x_gates come in (reverse: d_output and
what the forward pass saved) and the output goes out (reverse: d_x_gates); nothing else does.

Tiles are (hidden units, batch rows): the product of a step is W_hh @ h with W_hh as the left
operand, so that the large dimension is the M of the matrix instruction and a small batch its N.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cells import CELLS
from .layout import empty_steps, stride_unit
from .plan import Plan

# T, B and the strides change from call to call: a value of 1 or a multiple of 16 must not compile
# the kernel again. What the compiler may know about alignment, it learns from UNIT.
RUNTIME = [
    "T", "B", "reverse",
    "x_gates_stride_t", "x_gates_stride_b", "output_stride_t", "output_stride_b",
    "d_output_stride_t", "d_output_stride_b",
]  # fmt: skip


@triton.jit
def load_gates(ptrs, mask, GATE_STRIDE: tl.constexpr, GATES: tl.constexpr):
    tiles = ()
    for gate in tl.static_range(GATES):
        tiles += (tl.load(ptrs + gate * GATE_STRIDE, mask=mask, other=0.0),)
    return tiles


@triton.jit
def load_weights(ptrs, mask, GATES: tl.constexpr, PARTS: tl.constexpr, H: tl.constexpr):
    weights = load_gates(ptrs, mask, H * H, GATES)
    if PARTS == 2:
        weights += load_gates(ptrs + tl.num_programs(2) * GATES * H * H, mask, H * H, GATES)
    return weights


@triton.jit
def to_float32(tiles):
    converted = ()
    for i in tl.static_range(len(tiles)):
        converted += (tiles[i].to(tl.float32),)
    return converted


@triton.jit
def where_active(active, tiles):
    masked = ()
    for i in tl.static_range(len(tiles)):
        masked += (tl.where(active, tiles[i], 0.0),)
    return masked


@triton.jit
def round_tf32(x):
    """float32 to the nearest tf32; a matrix unit would cut the low 13 bits off, which is biased."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def recurrent_product(weights, gate: tl.constexpr, GATES: tl.constexpr, x, acc):
    """acc + W x for the W of one gate. float32 is multiplied in tf32: in one product, or, where
    W comes in two parts (high then low), in the three that give nearly all of float32."""
    if x.dtype == tl.float32:
        high = round_tf32(x)
        if len(weights) == 2 * GATES:
            acc = tl.dot(weights[GATES + gate], high, acc, input_precision="tf32")
            acc = tl.dot(weights[gate], x - high, acc, input_precision="tf32")
        acc = tl.dot(weights[gate], high, acc, input_precision="tf32")
    else:
        acc = tl.dot(weights[gate], x, acc)
    return acc


@triton.jit
def at_step(i, T, backwards):
    """The time index of the i-th step, from 0 up or, backwards, from T - 1 down; 64 bits wide."""
    return (i + backwards * (T - 1 - 2 * i)).to(tl.int64)


@triton.jit(do_not_specialize=[n for n in RUNTIME if not n.startswith("d_")])
def forward_kernel(
    x_gates_ptr,  # (T, B, D * GATES * H), last dimension contiguous
    h0_ptr,  # (D, B, H), contiguous
    weight_hh_ptr,  # (PARTS, D, GATES * H, H), contiguous
    lengths_ptr,  # (B,) or None; row b is active while t < lengths[b]
    output_ptr,  # (T, B, D * H), last dimension contiguous
    h_n_ptr,  # (D, B, H), contiguous
    T,
    B,
    reverse,  # 1: direction 0 walks from t = T - 1 down to 0, and direction 1 upwards
    x_gates_stride_t,  # every stride is in units of UNIT elements
    x_gates_stride_b,
    output_stride_t,
    output_stride_b,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    GATES: tl.constexpr,
    STEP: tl.constexpr,
    UNIT: tl.constexpr,
    PARTS: tl.constexpr,
):
    direction = tl.program_id(2)
    backwards = direction ^ reverse
    rows = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[None, :]
    units = tl.arange(0, BLOCK_H)[:, None]
    mask = (units < H) & (rows < B)
    x_gates_ptr += direction * GATES * H
    x_gates_offsets = rows * x_gates_stride_b * UNIT + units
    output_ptr += direction * H
    output_offsets = rows * output_stride_b * UNIT + units
    state_offsets = (direction * B + rows) * H + units

    # W_hh is read here, once, and stays in shared memory; the loop never touches its pointer.
    columns = tl.arange(0, BLOCK_H)[None, :]
    weights_ptr = weight_hh_ptr + direction * GATES * H * H + units * H + columns
    weights = load_weights(weights_ptr, (units < H) & (columns < H), GATES, PARTS, H)
    h = tl.load(h0_ptr + state_offsets, mask=mask, other=0.0)
    if lengths_ptr is not None:
        lengths = tl.load(lengths_ptr + rows, mask=rows < B, other=0)

    first = at_step(0, T, backwards) * x_gates_stride_t * UNIT
    x_gates = load_gates(x_gates_ptr + first + x_gates_offsets, mask, H, GATES)
    for i in range(T):
        # x_gates of the next step are asked for one step before they are needed.
        ahead = at_step(tl.minimum(i + 1, T - 1), T, backwards) * x_gates_stride_t * UNIT
        x_gates_ahead = load_gates(x_gates_ptr + ahead + x_gates_offsets, mask, H, GATES)
        h_gates = ()
        for gate in tl.static_range(GATES):
            zero = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
            h_gates += (recurrent_product(weights, gate, GATES, h, zero),)
        state = STEP(to_float32(x_gates), h_gates, (h,))
        output = state[0].to(h.dtype)
        t = at_step(i, T, backwards)
        if lengths_ptr is None:
            h = output
        else:  # an inactive row keeps its state and outputs zero
            active = t < lengths
            h = tl.where(active, output, h)
            output = tl.where(active, output, 0.0)
        tl.store(output_ptr + t * output_stride_t * UNIT + output_offsets, output, mask=mask)
        x_gates = x_gates_ahead
    tl.store(h_n_ptr + state_offsets, h, mask=mask)


@triton.jit(do_not_specialize=[n for n in RUNTIME if not n.startswith("x_gates")])
def reverse_kernel(
    d_output_ptr,  # (T, B, D * H), last dimension contiguous, or None
    d_h_n_ptr,  # (D, B, H), contiguous, or None
    output_ptr,  # (T, B, D * H), last dimension contiguous
    weight_hh_ptr,  # (PARTS, D, GATES * H, H), contiguous
    lengths_ptr,  # (B,) or None; row b is active while t < lengths[b]
    d_x_gates_ptr,  # (T, B, D * GATES * H), contiguous as output is, or None
    d_h0_ptr,  # (D, B, H), contiguous, or None
    T,
    B,
    reverse,  # as in the forward pass that is differentiated
    d_output_stride_t,  # every stride is in units of UNIT elements
    d_output_stride_b,
    output_stride_t,
    output_stride_b,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    GATES: tl.constexpr,
    STEP_VJP: tl.constexpr,
    UNIT: tl.constexpr,
    PARTS: tl.constexpr,
):
    direction = tl.program_id(2)
    backwards = direction ^ reverse ^ 1  # against the forward pass
    rows = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[None, :]
    units = tl.arange(0, BLOCK_H)[:, None]
    mask = (units < H) & (rows < B)
    output_ptr += direction * H
    output_offsets = rows * output_stride_b * UNIT + units
    state_offsets = (direction * B + rows) * H + units

    # W_hh transposed: rows are the units that h came from, columns the gates that it went to.
    columns = tl.arange(0, BLOCK_H)[None, :]
    weights_ptr = weight_hh_ptr + direction * GATES * H * H + columns * H + units
    weights = load_weights(weights_ptr, (units < H) & (columns < H), GATES, PARTS, H)
    if d_h_n_ptr is None:
        d_h = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
    else:
        d_h = tl.load(d_h_n_ptr + state_offsets, mask=mask, other=0.0).to(tl.float32)
    if lengths_ptr is not None:
        lengths = tl.load(lengths_ptr + rows, mask=rows < B, other=0)

    t = at_step(0, T, backwards)
    output = tl.load(output_ptr + t * output_stride_t * UNIT + output_offsets, mask=mask, other=0.0)
    if d_output_ptr is not None:
        d_output_ptr += direction * H
        d_output_offsets = rows * d_output_stride_b * UNIT + units
        d_output = tl.load(
            d_output_ptr + t * d_output_stride_t * UNIT + d_output_offsets, mask=mask, other=0.0
        )
    if d_x_gates_ptr is not None:
        d_x_gates_ptr += direction * GATES * H
        d_x_gates_offsets = rows * output_stride_b * GATES * UNIT + units
    for i in range(T):
        t = at_step(i, T, backwards)
        ahead = at_step(tl.minimum(i + 1, T - 1), T, backwards)
        output_ahead = tl.load(
            output_ptr + ahead * output_stride_t * UNIT + output_offsets, mask=mask, other=0.0
        )
        d_state = d_h
        if d_output_ptr is not None:
            d_state += d_output.to(tl.float32)
            d_output = tl.load(
                d_output_ptr + ahead * d_output_stride_t * UNIT + d_output_offsets,
                mask=mask,
                other=0.0,
            )
        d_x_gates, d_h_gates, d_prev = STEP_VJP((d_state,), to_float32((output,)))
        d_h_prev = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
        if len(d_prev) > 0:
            d_h_prev = d_prev[0]
        if lengths_ptr is not None:  # an inactive step passes no gradient to its gates
            d_x_gates = where_active(t < lengths, d_x_gates)
            d_h_gates = where_active(t < lengths, d_h_gates)
        for gate in tl.static_range(GATES):
            d_gate = d_h_gates[gate].to(weights[gate].dtype)
            d_h_prev = recurrent_product(weights, gate, GATES, d_gate, d_h_prev)
            if d_x_gates_ptr is not None:
                d_x_gates_t = d_x_gates_ptr + t * output_stride_t * GATES * UNIT + gate * H
                d_x_gate = d_x_gates[gate].to(d_x_gates_ptr.dtype.element_ty)
                tl.store(d_x_gates_t + d_x_gates_offsets, d_x_gate, mask=mask)
        if lengths_ptr is None:
            d_h = d_h_prev
        else:  # and hands d_h on as it came
            d_h = tl.where(t < lengths, d_h_prev, d_h)
        output = output_ahead
    if d_h0_ptr is not None:
        tl.store(d_h0_ptr + state_offsets, d_h.to(d_h0_ptr.dtype.element_ty), mask=mask)


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
    unit = stride_unit(x_gates, output)
    with on_device(x_gates):
        forward_kernel[plan.grid](
            x_gates,
            h0.contiguous(),
            tf32_parts(weight_hh, plan.parts),
            lengths,
            output,
            h_n,
            T,
            B,
            int(reverse),
            x_gates.stride(0) // unit,
            x_gates.stride(1) // unit,
            output.stride(0) // unit,
            output.stride(1) // unit,
            H=H,
            BLOCK_H=plan.block_h,
            BLOCK_B=plan.block_b,
            GATES=CELLS[cell].gates,
            STEP=CELLS[cell].step,
            UNIT=unit,
            PARTS=plan.parts,
            num_warps=plan.num_warps,
            num_stages=plan.num_stages,
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
    given = output if d_output is None else d_output
    unit = stride_unit(output, given)
    with on_device(output):
        reverse_kernel[plan.grid](
            d_output,
            None if d_h_n is None else d_h_n.contiguous(),
            output,
            tf32_parts(weight_hh, plan.parts),
            lengths,
            d_x_gates,
            d_h0,
            T,
            B,
            int(reverse),
            given.stride(0) // unit,
            given.stride(1) // unit,
            output.stride(0) // unit,
            output.stride(1) // unit,
            H=H,
            BLOCK_H=plan.block_h,
            BLOCK_B=plan.block_b,
            GATES=gates,
            STEP_VJP=CELLS[cell].step_vjp,
            UNIT=unit,
            PARTS=plan.parts,
            num_warps=plan.num_warps,
            num_stages=plan.num_stages,
        )
    return d_x_gates, d_h0
