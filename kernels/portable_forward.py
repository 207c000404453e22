"""The portable engine's two loops over time, one for each direction of differentiation; here the
first. launch.py launches them.

    portable_forward.py    state = STEP(x_gates[t], W_hh h, state)           t in processing order
    portable_backward.py   back-propagation through time (Werbos, 1990)      t in the opposite order

Both serve every cell: gates, states, what is stored and params are tuples of tiles, and the loops
unroll over them. One program owns BLOCK_B rows of the batch, in one direction of the layer, for all
steps, and one slice of BLOCK_S hidden units: all of them where SLICES is 1. It reads its part of
W_hh from device memory once, before the loop. In the loop x_gates come in (backward: d_output and
what the forward pass stored) and the output goes out (backward: d_x_gates); sliced, the blocks of a
batch tile also give each other their parts of a step (exchange.py). Nothing else comes or goes.

An iteration takes STEPS steps, which share one read of W_hh out of shared memory. All rows are
inactive in steps beyond the last one.

Tiles are (hidden units, batch rows). h is rounded to the dtype of the tensors where W_hh takes it;
the other states stay in float32 from step to step.

Rows of different length: row b is active while t < lengths[b]. Nothing is read of an inactive row,
it keeps its state, and zeros are written of it; packed (offsets), it is no part of memory, and
nothing is written either.

Regularisers are None where they are off, and then no part of the code. h_mask stands between h and
W_hh. What `keep` mixes into the states (zoneout) is no business of STEP: what came out of it is
stored after all that it saved, and its VJP reads that.
"""

import triton
import triton.language as tl

from .exchange import gather, report, wait_for_slices
from .products import gate_products, load_weights
from .steps import (
    active_at,
    at,
    at_step,
    existing,
    from_second,
    load_params,
    load_tiles,
    mix,
    place_of,
    scale,
    steps_of,
    store_tiles,
    store_wanted,
    to_float32,
    where_active,
    with_first,
)

# T, B and the strides change from call to call: a value of 1 or a multiple of 16 must not compile
# the kernel again. What the compiler may know about alignment, it learns from UNIT.
RUNTIME = [
    "T", "B", "first_tile", "reverse", "launch", "patience",
    "x_gates_stride_t", "x_gates_stride_b", "output_stride_t", "output_stride_b",
    "stored_stride_t", "stored_stride_b", "keep_stride_t", "keep_stride_b",
]  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    x_gates_ptr,  # (T, B, D * GATES * H) or packed (rows, D * GATES * H), last dimension contiguous
    state0_ptrs,  # S tensors (D, B, H), contiguous
    weight_hh_ptr,  # (PARTS, D, GATES * H, H), contiguous
    param_ptrs,  # the cell's params, each (D, H), contiguous
    lengths_ptr,  # (B,) or None; row b is active while t < lengths[b]
    h_mask_ptr,  # (D, B, H), contiguous, or None
    keep_ptr,  # as x_gates, D * S * H wide, or None
    offsets_ptr,  # (T,): the rows of step t begin at offsets[t]; None where they are not packed
    output_ptr,  # as x_gates, D * H wide
    stored_ptr,  # as x_gates, D * K * H wide: the states beside h, then what STEP saves; or None
    state_n_ptrs,  # S tensors (D, B, H), contiguous
    exchange_ptr,  # (2, D, B, H), or None where SLICES is 1, as the two after it
    flags_ptr,  # (D, all tiles of the batch, T) int32, zero
    fault_ptr,  # (WORDS,) int32 on the host, see faults.py
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
    stored_stride_t,
    stored_stride_b,
    keep_stride_t,
    keep_stride_b,
    H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_B: tl.constexpr,
    DIRECT: tl.constexpr,  # how load_tiles and store_tiles go about it in the loop
    STEPS: tl.constexpr,  # of an iteration of the loop: one read of W_hh serves them all
    GATES: tl.constexpr,
    STORED: tl.constexpr,
    STEP: tl.constexpr,
    ACROSS: tl.constexpr,  # STEP takes, after the params, what each unit counts in a mean of all
    READS_H: tl.constexpr,  # STEP reads h itself: it is carried in float32 too
    APPROXIMATE: tl.constexpr,
    UNIT: tl.constexpr,
    PARTS: tl.constexpr,
    SLICES: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PIECES: tl.constexpr,
    STACKED: tl.constexpr,
):
    tile = first_tile + tl.program_id(0)
    direction = tl.program_id(2)
    D = tl.num_programs(2)
    backwards = direction ^ reverse
    rows = (tile * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[None, :]
    first_unit = tl.program_id(1) * BLOCK_S
    units = first_unit + tl.arange(0, BLOCK_S)[:, None]
    mask = (units < H) & (rows < B)
    dtype: tl.constexpr = output_ptr.dtype.element_ty
    x_gates_offsets = direction * GATES * H + rows * x_gates_stride_b * UNIT + units
    x_gates_steps = (x_gates_ptr, x_gates_stride_t.to(tl.int64) * UNIT, x_gates_offsets)
    output_offsets = direction * H + rows * output_stride_b * UNIT + units
    output_steps = (output_ptr, output_stride_t.to(tl.int64) * UNIT, output_offsets)
    if stored_ptr is not None:
        stored_offsets = direction * STORED * H + rows * stored_stride_b * UNIT + units
        stored_steps = (stored_ptr, stored_stride_t.to(tl.int64) * UNIT, stored_offsets)
    state_rows = (direction * B + rows) * H
    if h_mask_ptr is not None:
        h_mask = tl.load(h_mask_ptr + state_rows + units, mask=mask, other=0.0).to(tl.float32)
    if keep_ptr is not None:
        STATES: tl.constexpr = len(state0_ptrs)
        keep_offsets = direction * STATES * H + rows * keep_stride_b * UNIT + units
        keep_steps = (keep_ptr, keep_stride_t.to(tl.int64) * UNIT, keep_offsets)
    lengths = None
    if lengths_ptr is not None:
        lengths = tl.load(lengths_ptr + rows, mask=rows < B, other=0)
    steps = steps_of(T, lengths, offsets_ptr is not None)
    within = lengths if offsets_ptr is not None else None  # where zeros are no part of memory

    # W_hh is read here, once, and stays on the chip; the loop never touches its pointer.
    weight_hh_ptr += direction * GATES * H * H
    if STACKED:
        stack = tl.arange(0, 4 * BLOCK_S)[:, None]
        unit = first_unit + stack % BLOCK_S
        row_offsets = (stack // BLOCK_S * H + unit) * H
        row_mask = (unit < H) & (stack < GATES * BLOCK_S)
    else:
        row_offsets = units * H
        row_mask = units < H
    GROUPS: tl.constexpr = 1 if STACKED else GATES
    weights = load_weights(
        weight_hh_ptr, row_offsets, row_mask, D * GATES * H * H, H * H, 1, GROUPS, PARTS, H, CHUNK,
        CHUNKS, PIECES,
    )  # fmt: skip
    params = load_params(param_ptrs, direction * H + units, units < H)
    if ACROSS:
        tl.static_assert(SLICES == 1, "a block has to hold all units of its rows")
        params += (tl.where(units < H, 1.0 / H, 0.0),)
    state = ()
    for s in tl.static_range(len(state0_ptrs)):
        loaded = tl.load(state0_ptrs[s] + state_rows + units, mask=mask, other=0.0)
        if s > 0 or READS_H:
            loaded = loaded.to(tl.float32)
        state += (loaded,)
    alive = tl.full((), True, tl.int1)
    if SLICES == 1:
        h = (state[0].to(dtype),)
        if h_mask_ptr is not None:
            h = ((state[0] * h_mask).to(dtype),)
    else:
        h = gather(state0_ptrs[0], state_rows, rows < B, H, CHUNK, CHUNKS)
        if h_mask_ptr is not None:
            h = scale(h, gather(h_mask_ptr, state_rows, rows < B, H, CHUNK, CHUNKS))
        exchange_size = D.to(tl.int64) * B * H
        flags_ptr += (direction * tl.cdiv(B, BLOCK_B) + tile).to(tl.int64) * T

    place = place_of(0, steps, backwards, offsets_ptr)
    place_ahead = place_of(1, steps, backwards, offsets_ptr)
    wanted = mask & active_at(0, steps, backwards, lengths)
    x_gates = load_tiles(at(x_gates_steps, place), wanted, H, GATES, DIRECT)
    if keep_ptr is not None:
        keep = load_tiles(at(keep_steps, place), wanted, H, STATES, DIRECT)
    # DIRECT, each step ends with the product that the next one begins with, so that the matrix unit
    # works while results go out. Elsewhere that costs two barriers more than it brings.
    if DIRECT:
        h_gates = gate_products(weights, GATES, STACKED, h, alive, SLICES, PIECES)
    for begin in range(0, steps, STEPS):
        for k in tl.static_range(STEPS):
            i = begin + k
            # x_gates of the next step are asked for one step before they are needed, and the place
            # of packed rows one step before that.
            if offsets_ptr is None:
                place = at_step(i, steps, backwards)
                place_ahead = at_step(i + 1, steps, backwards)
            else:
                place_after = place_of(i + 2, steps, backwards, offsets_ptr)
            wanted = mask & active_at(i + 1, steps, backwards, lengths)
            x_gates_ahead = load_tiles(at(x_gates_steps, place_ahead), wanted, H, GATES, DIRECT)
            if not DIRECT:
                h_gates = gate_products(weights, GATES, STACKED, h, alive, SLICES, PIECES)
            after, saved = STEP(
                to_float32(x_gates), h_gates, to_float32(state), params, APPROXIMATE
            )
            if keep_ptr is not None:
                saved += after
                after = mix(to_float32(keep), state, after)
                keep = load_tiles(at(keep_steps, place_ahead), wanted, H, STATES, DIRECT)
            output = after[0].to(dtype)
            state_after = with_first(after[0] if READS_H else output, after)
            present, written = mask, mask
            if lengths is None and k == 0:
                state = state_after
            else:  # an inactive row keeps its state and outputs zero; beyond the end all are
                active = active_at(i, steps, backwards, lengths)
                state = where_active(active, state_after, state)
                output = tl.where(active, output, 0.0)
                present = mask & active
                written = mask & active_at(i, steps, backwards, within)
            taken = state[0]  # by W_hh
            if h_mask_ptr is not None:
                taken = taken * h_mask
            if SLICES == 1:
                h = (existing(taken, mask, H).to(dtype),)
            else:
                slot_ptr = exchange_ptr + (i % 2) * exchange_size
                tl.store(slot_ptr + state_rows + units, taken.to(dtype), mask=mask)
                alive = wait_for_slices(flags_ptr + i, tl.where(alive, patience, 0), SLICES) & alive
                h = gather(slot_ptr, state_rows, rows < B, H, CHUNK, CHUNKS)
            if DIRECT:
                h_gates = gate_products(weights, GATES, STACKED, h, alive, SLICES, PIECES)
            store_tiles(at(output_steps, place), (output,), written, H, DIRECT)
            if stored_ptr is not None:
                store_tiles(at(stored_steps, place), from_second(after) + saved, present, H, DIRECT)
            x_gates = x_gates_ahead
            if offsets_ptr is not None:
                place = place_ahead
                place_ahead = place_after
    if SLICES > 1:
        state = report(alive, state, fault_ptr, launch)
    store_wanted(state_n_ptrs, state_rows + units, state, mask)
