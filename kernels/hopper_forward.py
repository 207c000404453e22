"""The Hopper engine's forward loop: that of portable_forward.py in Gluon, with W_hh in registers.

    state = STEP(x_gates[t], W_hh h, state)           t in processing order

hopper_backward.py has the other loop. What follows holds for both.

A program is one CTA or a cluster of CTAS. It owns BLOCK_B rows of the batch, in one direction of
the layer, for all steps; each CTA owns BLOCK_S hidden units and holds the rows of W_hh of their
gates, read once before the loop: in registers, as the left operand of wgmma, and what does not fit
there in shared memory. In the backward pass it holds the same rows, transposed. The CTAs of a
cluster give each other their parts of a step through their shared memory (cluster.py).

Where the data lie: the states, params and sums in float32 in registers; h, or the gradients of the
gates, rounded to the dtype of the tensors (float32: to tf32), in two buffers of shared memory, used
in turns; what a step reads of device memory in AHEAD slots of shared memory, asked for AHEAD steps
before it is needed. With two buffers a step needs one barrier: between what all warps stored of an
operand and the products that read it. The copies from device memory are waited for just before
that barrier, so that it serves them as well.

Rows of different length: row b is active while t < lengths[b]. An inactive row keeps its state, and
zeros are written of it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .cluster import (
    allocate_arrivals,
    allocate_h,
    await_exchange,
    everyone_layout,
    send_to_all,
)
from .hopper_layouts import accumulator_layout, copies_layout, gates_layout, units_layout
from .hopper_tiles import (
    advance,
    allocate_operands,
    allocate_slots,
    ask,
    finished,
    in_gates,
    in_units,
    pieces_of,
    place_in,
    put,
    rows_of_weights,
    start_sum,
    take,
    walk,
)
from .steps import (
    at_step,
    existing,
    load_params,
    store_tiles,
    store_wanted,
    to_float32,
    where_active,
)

# As in portable_forward.py: a value of 1 or a multiple of 16 must not compile the kernel again.
RUNTIME = [
    "T", "B", "reverse",
    "x_gates_stride_t", "x_gates_stride_b", "output_stride_t", "output_stride_b",
    "stored_stride_t", "stored_stride_b",
]  # fmt: skip


@gluon.jit
def ask_x_gates(i, T, ptrs, mask, tiles, H: gl.constexpr, ALIGNED: gl.constexpr):
    """x_gates of the i-th step, if there is one."""
    for gate in gl.static_range(len(tiles)):
        ask(tiles[gate], ptrs + gate * H, mask & (i < T), ALIGNED)
    async_copy.commit_group()


@gluon.jit
def pass_on(h, buffer, arrived, EVERYONE: gl.constexpr):
    """Hand h to the next products, of this CTA or of all CTAs of the cluster."""
    if arrived is None:
        put(buffer, (h,))
    else:
        send_to_all(buffer, h, arrived, EVERYONE)


@gluon.jit
def start_products(i, weights, operand, arrived, zero, CHUNK: gl.constexpr):
    """Start W_hh h for the h that was passed on as the i-th."""
    if arrived is not None:
        await_exchange(i, arrived)
    return start_sum(weights, pieces_of(operand, len(weights), CHUNK), zero)


@gluon.jit
def gates_of(product, PLACES: gl.constexpr, UNITS: gl.constexpr):
    product = finished(product)
    if PLACES is None:
        gates = (in_units(product, UNITS),)
    else:
        gates = in_gates(product, PLACES, UNITS)
    return gates


@gluon.jit
def forward_step(
    i, h_gates, state, x_gates, ptrs, slot, slot_ahead, buffer, operand, arrived, weights, params,
    T, backwards, copy_mask, strides, mask, lengths, zero, H: gl.constexpr, STEP: gl.constexpr,
    READS_H: gl.constexpr, APPROXIMATE: gl.constexpr, UNIT: gl.constexpr, ALIGNED: gl.constexpr,
    AHEAD: gl.constexpr, CHUNK: gl.constexpr, PLACES: gl.constexpr, EVERYONE: gl.constexpr,
    UNITS: gl.constexpr,
):  # fmt: skip
    """The i-th step, and the products of the next one."""
    dtype: gl.constexpr = operand.dtype
    after, saved = STEP(to_float32(x_gates), h_gates, to_float32(state), params, APPROXIMATE)
    output = after[0].to(dtype)
    if READS_H:
        state_after = (after[0],)
    else:
        state_after = (output,)
    beside_h = ()
    for s in gl.static_range(1, len(state)):
        beside_h += (after[s],)
    state_after += beside_h
    if lengths is None:
        state = state_after
    else:  # an inactive row keeps its state and outputs zero
        active = at_step(i, T, backwards) < lengths
        state = where_active(active, state_after, state)
        output = gl.where(active, output, 0.0)
    pass_on(existing(state[0], mask, H), buffer, arrived, EVERYONE)
    async_copy.wait_group(AHEAD - 2)  # x_gates of the next step are there
    product = start_products(i + 1, weights, operand, arrived, zero, CHUNK)
    # While the matrix unit works, the rest: nothing below has to do with the next h_gates.
    gl.store(ptrs[1], output, mask=mask)
    if len(ptrs) > 2:
        store_tiles(ptrs[2], beside_h + saved, mask, H, False)
    ask_x_gates(i + AHEAD, T, ptrs[0], copy_mask, slot, H, ALIGNED)
    ptrs = advance(ptrs, strides, UNIT)
    x_gates = take(slot_ahead, 0, len(slot_ahead), UNITS)
    return gates_of(product, PLACES, UNITS), state, x_gates, ptrs


@gluon.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    x_gates_ptr,  # (T, B, D * GATES * H), last dimension contiguous
    state0_ptrs,  # S tensors (D, B, H), contiguous
    weight_hh_ptr,  # (D, GATES * H, H), contiguous; float32 rounded to tf32
    param_ptrs,  # the cell's params, each (D, H), contiguous
    lengths_ptr,  # (B,) or None; row b is active while t < lengths[b]
    output_ptr,  # as x_gates, D * H wide
    stored_ptr,  # as x_gates, D * K * H wide: the states beside h, then what STEP saves; or None
    state_n_ptrs,  # S tensors (D, B, H), contiguous
    T,
    B,
    reverse,  # 1: direction 0 walks from t = T - 1 down to 0, and direction 1 upwards
    x_gates_stride_t,  # every stride is in units of UNIT elements
    x_gates_stride_b,
    output_stride_t,
    output_stride_b,
    stored_stride_t,
    stored_stride_b,
    H: gl.constexpr,
    BLOCK_S: gl.constexpr,  # units of a CTA, of one gate at least 64, of four at least 16
    BLOCK_B: gl.constexpr,
    GATES: gl.constexpr,
    STORED: gl.constexpr,
    STEP: gl.constexpr,
    READS_H: gl.constexpr,  # STEP reads h itself: it is carried in float32 too
    APPROXIMATE: gl.constexpr,
    UNIT: gl.constexpr,
    AHEAD: gl.constexpr,  # steps, an even number
    CTAS: gl.constexpr,
    CHUNK: gl.constexpr,  # columns of a tile of W_hh
    HELD: gl.constexpr,  # tiles of W_hh in shared memory
):
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = output_ptr.dtype.element_ty
    BITS: gl.constexpr = dtype.primitive_bitwidth
    WHOLE: gl.constexpr = CTAS * BLOCK_S
    STACKED: gl.constexpr = GATES > 1
    MMA: gl.constexpr = accumulator_layout(BLOCK_B, WARPS, BITS, CTAS)
    UNITS: gl.constexpr = units_layout(STACKED, BLOCK_S, BLOCK_B, WARPS, CTAS)
    PLACES: gl.constexpr = gates_layout(BLOCK_S, BLOCK_B, WARPS, CTAS) if STACKED else None
    EVERYONE: gl.constexpr = everyone_layout(STACKED, BLOCK_S, BLOCK_B, WARPS, BITS, CTAS)
    COPIES: gl.constexpr = copies_layout(BLOCK_S, BLOCK_B, WARPS, BITS, CTAS)
    ALIGNED: gl.constexpr = H * BITS % 32 == 0 and UNIT * BITS % 32 == 0
    direction = gl.program_id(1)
    backwards = direction ^ reverse
    copy_rows, copy_units = place_in(COPIES, 1, WHOLE, BLOCK_B)
    copy_mask = (copy_rows < B) & (copy_units < H)
    rows, units = place_in(UNITS, 0, WHOLE, BLOCK_B)
    mask = (rows < B) & (units < H)
    x_gates_ptrs = x_gates_ptr + direction * GATES * H + copy_rows * x_gates_stride_b * UNIT
    x_gates_ptrs, stride = walk(x_gates_ptrs + copy_units, x_gates_stride_t, UNIT, T, backwards)
    ptrs, strides = (x_gates_ptrs,), (stride,)
    output_ptrs = output_ptr + direction * H + rows * output_stride_b * UNIT + units
    output_ptrs, stride = walk(output_ptrs, output_stride_t, UNIT, T, backwards)
    ptrs += (output_ptrs,)
    strides += (stride,)
    if stored_ptr is not None:
        stored_ptrs = stored_ptr + direction * STORED * H + rows * stored_stride_b * UNIT + units
        stored_ptrs, stride = walk(stored_ptrs, stored_stride_t, UNIT, T, backwards)
        ptrs += (stored_ptrs,)
        strides += (stride,)
    state_offsets = (direction * B + rows) * H + units
    lengths = None
    if lengths_ptr is not None:
        lengths = gl.load(lengths_ptr + rows, mask=rows < B, other=0)

    slots = allocate_slots(dtype, BLOCK_S, BLOCK_B, CTAS, GATES, AHEAD)
    for k in gl.static_range(AHEAD):
        ask_x_gates(k, T, x_gates_ptrs + k * UNIT * strides[0], copy_mask, slots[k], H, ALIGNED)
    ptrs = (ptrs[0] + AHEAD * UNIT * strides[0],) + ptrs[1:]
    # W_hh is read here, once, and stays on the chip; the loop never touches its pointer.
    weight_hh_ptr += direction * GATES * H * H
    weights = rows_of_weights(weight_hh_ptr, H, BLOCK_S, CTAS, GATES, CHUNK, HELD, MMA)
    params = load_params(param_ptrs, direction * H + units, units < H)
    state = ()
    for s in gl.static_range(len(state0_ptrs)):
        loaded = gl.load(state0_ptrs[s] + state_offsets, mask=mask, other=0.0)
        if s > 0 or READS_H:
            loaded = loaded.to(gl.float32)
        state += (loaded,)
    if CTAS == 1:
        buffer0, operand0 = allocate_operands(dtype, BLOCK_S, BLOCK_B, 1, 1)
        buffer1, operand1 = allocate_operands(dtype, BLOCK_S, BLOCK_B, 1, 1)
        buffers, operands = (buffer0, buffer1), operand0 + operand1
        arrived = (None, None)
    else:
        buffer0, operand0 = allocate_h(dtype, WHOLE, BLOCK_B, CTAS)
        buffer1, operand1 = allocate_h(dtype, WHOLE, BLOCK_B, CTAS)
        buffers, operands = (buffer0, buffer1), (operand0, operand1)
        arrived = allocate_arrivals()
    zero = gl.zeros([(4 if STACKED else 1) * WHOLE, BLOCK_B], gl.float32, MMA)
    pass_on(state[0], buffers[0], arrived[0], EVERYONE)
    async_copy.wait_group(AHEAD - 1)
    product = start_products(0, weights, operands[0], arrived[0], zero, CHUNK)
    x_gates = take(slots[0], 0, GATES, UNITS)
    h_gates = gates_of(product, PLACES, UNITS)
    rest = T % AHEAD
    for i in range(0, T - rest, AHEAD):
        for k in gl.static_range(AHEAD):
            h_gates, state, x_gates, ptrs = forward_step(
                i + k, h_gates, state, x_gates, ptrs, slots[k], slots[(k + 1) % AHEAD],
                buffers[(k + 1) % 2], operands[(k + 1) % 2], arrived[(k + 1) % 2], weights, params,
                T, backwards, copy_mask, strides, mask, lengths, zero, H, STEP, READS_H,
                APPROXIMATE, UNIT, ALIGNED, AHEAD, CHUNK, PLACES, EVERYONE, UNITS,
            )  # fmt: skip
    for k in gl.static_range(AHEAD - 1):
        if k < rest:
            h_gates, state, x_gates, ptrs = forward_step(
                T - rest + k, h_gates, state, x_gates, ptrs, slots[k], slots[k + 1],
                buffers[(k + 1) % 2], operands[(k + 1) % 2], arrived[(k + 1) % 2], weights, params,
                T, backwards, copy_mask, strides, mask, lengths, zero, H, STEP, READS_H,
                APPROXIMATE, UNIT, ALIGNED, AHEAD, CHUNK, PLACES, EVERYONE, UNITS,
            )  # fmt: skip
    async_copy.wait_group(0)
    store_wanted(state_n_ptrs, state_offsets, state, mask)
