"""The two loops over time, one for each direction of differentiation. launch.py launches them.

    forward_kernel   state = STEP(x_gates[t], W_hh h, state)            t in processing order
    reverse_kernel   back-propagation through time (Werbos, 1990)       t in the opposite order

One program owns BLOCK_B rows of the batch, in one direction of the layer, for all T steps, and one
slice of the hidden units: all of them where SLICES is 1. It reads its part of W_hh from device
memory once, before the loop. In the loop x_gates come in (reverse: d_output and what the forward
pass saved) and the output goes out (reverse: d_x_gates); sliced, the blocks of a batch tile also
give each other their parts of a step (exchange.py). Nothing else comes or goes.

Tiles are (hidden units, batch rows): the product of a step is W_hh @ h with W_hh as the left
operand, so that the large dimension is the M of the matrix instruction and a small batch its N.
"""

import triton
import triton.language as tl

from .exchange import gather, report, wait_for_slices

# T, B and the strides change from call to call: a value of 1 or a multiple of 16 must not compile
# the kernel again. What the compiler may know about alignment, it learns from UNIT.
RUNTIME = [
    "T", "B", "first_tile", "reverse", "launch", "patience",
    "x_gates_stride_t", "x_gates_stride_b", "output_stride_t", "output_stride_b",
    "d_output_stride_t", "d_output_stride_b",
]  # fmt: skip


@triton.jit
def load_gates(ptrs, mask, H: tl.constexpr, GATES: tl.constexpr):
    tiles = ()
    for gate in tl.static_range(GATES):
        tiles += (tl.load(ptrs + gate * H, mask=mask, other=0.0),)
    return tiles


@triton.jit
def load_weights(
    weight_ptr,
    units,  # (M, 1): the rows of the tiles
    unit_stride: tl.constexpr,
    column_stride: tl.constexpr,
    GATES: tl.constexpr,
    PARTS: tl.constexpr,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """PARTS x GATES x CHUNKS tiles of W_hh or its transpose, each (M, CHUNK)."""
    tiles = ()
    for part in tl.static_range(PARTS):
        for gate in tl.static_range(GATES):
            gate_ptr = weight_ptr + part * tl.num_programs(2) * GATES * H * H + gate * H * H
            for c in tl.static_range(CHUNKS):
                columns = c * CHUNK + tl.arange(0, CHUNK)[None, :]
                mask = (units < H) & (columns < H)
                ptrs = gate_ptr + units * unit_stride + columns * column_stride
                tiles += (tl.load(ptrs, mask=mask, other=0.0),)
    return tiles


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
def recurrent_product(
    weights, gate: tl.constexpr, GATES: tl.constexpr, chunks, alive, acc, SLICES: tl.constexpr
):
    """acc + W x for the W of one gate, W and x in as many chunks as the tuple has; NaN if x did
    not all come. float32 is multiplied in tf32: in one product, or, where W comes in two parts
    (high then low), in the three that give nearly all of float32."""
    for c in tl.static_range(len(chunks)):
        W = weights[gate * len(chunks) + c]
        # Chosen here and not where x is loaded: the compiler copies a tile to shared memory right
        # after the operation that made it, and so needs room for one chunk at a time.
        x = chunks[c]
        if SLICES > 1:
            x = tl.where(alive, x, float("nan"))
        if W.dtype == tl.float32:
            high = round_tf32(x)
            if len(weights) == 2 * GATES * len(chunks):
                W_low = weights[(GATES + gate) * len(chunks) + c]
                acc = tl.dot(W_low, high, acc, input_precision="tf32")
                acc = tl.dot(W, x - high, acc, input_precision="tf32")
            acc = tl.dot(W, high, acc, input_precision="tf32")
        else:
            acc = tl.dot(W, x, acc)
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
    exchange_ptr,  # (2, D, B, H), or None where SLICES is 1, as the two after it
    flags_ptr,  # (D, all tiles of the batch, T) int32, zero
    fault_ptr,  # one int32 on the host
    T,
    B,
    first_tile,  # of the batch tiles of this launch
    reverse,  # 1: direction 0 walks from t = T - 1 down to 0, and direction 1 upwards
    launch,  # the number that a fault is reported under
    patience,  # polls of a flag before the wait is given up
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
    SLICES: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    BLOCK_S: tl.constexpr = BLOCK_H // SLICES
    CHUNK: tl.constexpr = BLOCK_H // CHUNKS
    tile = first_tile + tl.program_id(0)
    direction = tl.program_id(2)
    backwards = direction ^ reverse
    rows = (tile * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[None, :]
    units = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
    mask = (units < H) & (rows < B)
    x_gates_ptr += direction * GATES * H
    x_gates_offsets = rows * x_gates_stride_b * UNIT + units
    output_ptr += direction * H
    output_offsets = rows * output_stride_b * UNIT + units
    state_rows = (direction * B + rows) * H

    # W_hh is read here, once, and stays in shared memory; the loop never touches its pointer.
    weight_hh_ptr += direction * GATES * H * H
    weights = load_weights(weight_hh_ptr, units, H, 1, GATES, PARTS, H, CHUNK, CHUNKS)
    state_h = tl.load(h0_ptr + state_rows + units, mask=mask, other=0.0)
    alive = tl.full((), True, tl.int1)
    if SLICES == 1:
        h = (state_h,)
    else:
        h = gather(h0_ptr, state_rows, rows < B, H, CHUNK, CHUNKS)
        flags_ptr += (direction * tl.cdiv(B, BLOCK_B) + tile).to(tl.int64) * T
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
            zero = tl.zeros((BLOCK_S, BLOCK_B), tl.float32)
            h_gates += (recurrent_product(weights, gate, GATES, h, alive, zero, SLICES),)
        state = STEP(to_float32(x_gates), h_gates, (state_h,))
        output = state[0].to(state_h.dtype)
        t = at_step(i, T, backwards)
        if lengths_ptr is None:
            state_h = output
        else:  # an inactive row keeps its state and outputs zero
            active = t < lengths
            state_h = tl.where(active, output, state_h)
            output = tl.where(active, output, 0.0)
        tl.store(output_ptr + t * output_stride_t * UNIT + output_offsets, output, mask=mask)
        if SLICES == 1:
            h = (state_h,)
        else:
            slot_ptr = exchange_ptr + (i % 2) * tl.num_programs(2) * B * H
            tl.store(slot_ptr + state_rows + units, state_h, mask=mask)
            alive = wait_for_slices(flags_ptr + i, tl.where(alive, patience, 0), SLICES) & alive
            h = gather(slot_ptr, state_rows, rows < B, H, CHUNK, CHUNKS)
        x_gates = x_gates_ahead
    if SLICES > 1:
        state_h = report(alive, state_h, fault_ptr, launch)
    tl.store(h_n_ptr + state_rows + units, state_h, mask=mask)


@triton.jit(do_not_specialize=[n for n in RUNTIME if not n.startswith("x_gates")])
def reverse_kernel(
    d_output_ptr,  # (T, B, D * H), last dimension contiguous, or None
    d_h_n_ptr,  # (D, B, H), contiguous, or None
    output_ptr,  # (T, B, D * H), last dimension contiguous
    weight_hh_ptr,  # (PARTS, D, GATES * H, H), contiguous
    lengths_ptr,  # (B,) or None; row b is active while t < lengths[b]
    d_x_gates_ptr,  # (T, B, D * GATES * H), contiguous as output is, or None
    d_h0_ptr,  # (D, B, H), contiguous, or None
    exchange_ptr,  # (2, D, B, GATES * H), or None where SLICES is 1, as the two after it
    flags_ptr,  # (D, all tiles of the batch, T) int32, zero
    fault_ptr,  # one int32 on the host
    T,
    B,
    first_tile,  # of the batch tiles of this launch
    reverse,  # as in the forward pass that is differentiated
    launch,  # the number that a fault is reported under
    patience,  # polls of a flag before the wait is given up
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
    SLICES: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    BLOCK_S: tl.constexpr = BLOCK_H // SLICES
    CHUNK: tl.constexpr = BLOCK_H // CHUNKS
    tile = first_tile + tl.program_id(0)
    direction = tl.program_id(2)
    backwards = direction ^ reverse ^ 1  # against the forward pass
    rows = (tile * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[None, :]
    units = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
    mask = (units < H) & (rows < B)
    output_ptr += direction * H
    output_offsets = rows * output_stride_b * UNIT + units
    state_rows = (direction * B + rows) * H

    # W_hh transposed: rows are the units that h came from, columns the gates that it went to.
    weight_hh_ptr += direction * GATES * H * H
    weights = load_weights(weight_hh_ptr, units, 1, H, GATES, PARTS, H, CHUNK, CHUNKS)
    if d_h_n_ptr is None:
        d_h = tl.zeros((BLOCK_S, BLOCK_B), tl.float32)
    else:
        d_h = tl.load(d_h_n_ptr + state_rows + units, mask=mask, other=0.0).to(tl.float32)
    if lengths_ptr is not None:
        lengths = tl.load(lengths_ptr + rows, mask=rows < B, other=0)
    alive = tl.full((), True, tl.int1)
    if SLICES > 1:
        flags_ptr += (direction * tl.cdiv(B, BLOCK_B) + tile).to(tl.int64) * T

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
        d_h_prev = tl.zeros((BLOCK_S, BLOCK_B), tl.float32)
        if len(d_prev) > 0:
            d_h_prev = d_prev[0]
        if lengths_ptr is not None:  # an inactive step passes no gradient to its gates
            d_x_gates = where_active(t < lengths, d_x_gates)
            d_h_gates = where_active(t < lengths, d_h_gates)
        if d_x_gates_ptr is not None:
            d_x_gates_t = d_x_gates_ptr + t * output_stride_t * GATES * UNIT + d_x_gates_offsets
            for gate in tl.static_range(GATES):
                d_x_gate = d_x_gates[gate].to(d_x_gates_ptr.dtype.element_ty)
                tl.store(d_x_gates_t + gate * H, d_x_gate, mask=mask)
        if SLICES > 1:
            slot_ptr = exchange_ptr + (i % 2) * tl.num_programs(2) * B * GATES * H
            for gate in tl.static_range(GATES):
                part_ptrs = slot_ptr + state_rows * GATES + gate * H + units
                tl.store(part_ptrs, d_h_gates[gate].to(output.dtype), mask=mask)
            alive = wait_for_slices(flags_ptr + i, tl.where(alive, patience, 0), SLICES) & alive
        for gate in tl.static_range(GATES):
            if SLICES == 1:
                d_gate = (d_h_gates[gate].to(output.dtype),)
            else:
                whole_ptr = slot_ptr + gate * H
                d_gate = gather(whole_ptr, state_rows * GATES, rows < B, H, CHUNK, CHUNKS)
            d_h_prev = recurrent_product(weights, gate, GATES, d_gate, alive, d_h_prev, SLICES)
        if lengths_ptr is None:
            d_h = d_h_prev
        else:  # and hands d_h on as it came
            d_h = tl.where(t < lengths, d_h_prev, d_h)
        output = output_ahead
    if SLICES > 1:
        d_h = report(alive, d_h, fault_ptr, launch)
    if d_h0_ptr is not None:
        tl.store(d_h0_ptr + state_rows + units, d_h.to(d_h0_ptr.dtype.element_ty), mask=mask)
