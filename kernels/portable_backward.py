"""The portable engine's backward loop. portable_forward.py says what both loops do."""

import triton
import triton.language as tl

from .exchange import gather, report, wait_for_slices
from .portable_forward import RUNTIME
from .products import load_weights, recurrent_product
from .steps import (
    active_at,
    add,
    at,
    at_step,
    clamp,
    existing,
    last_of,
    load_or_zero,
    load_params,
    load_states,
    load_tiles,
    place_of,
    scale,
    steps_of,
    store_tiles,
    store_wanted,
    subtract,
    to_float32,
    where_active,
    with_first,
    zero_where_not,
)

RUNTIME_BACKWARD = ["d_output_stride_t", "d_output_stride_b"]


@triton.jit(do_not_specialize=RUNTIME + RUNTIME_BACKWARD)
def backward_kernel(
    d_output_ptr,  # as output, or None
    d_state_n_ptrs,  # for each state (D, B, H), contiguous, or None
    state0_ptrs,  # the five tensors of the forward pass, as it read and wrote them
    output_ptr,
    stored_ptr,
    weight_hh_ptr,
    param_ptrs,
    lengths_ptr,
    h_mask_ptr,
    keep_ptr,
    grad_clip,  # float or None
    offsets_ptr,
    d_x_gates_ptr,  # as x_gates, or None
    d_h_gates_ptr,  # in the same place as d_x_gates, or None where they are the same
    d_state0_ptrs,  # for each state (D, B, H), contiguous, or None
    d_params_ptr,  # (params, all tiles of the batch, D, H) float32, contiguous, or None
    exchange_ptr,  # (2, D, B, GATES * H), or None where SLICES is 1, as the two after it
    flags_ptr,  # (D, all tiles of the batch, T) int32, zero
    fault_ptr,  # (WORDS,) int32 on the host, see faults.py
    T,
    B,
    first_tile,  # of the batch tiles of this launch
    reverse,  # as in the forward pass that is differentiated
    launch,  # the number that a fault is reported under
    patience,  # polls of a flag before the wait is given up
    d_output_stride_t,  # every stride is in units of UNIT elements
    d_output_stride_b,
    x_gates_stride_t,  # those of d_x_gates and d_h_gates
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
    DIRECT: tl.constexpr,
    STEPS: tl.constexpr,
    GATES: tl.constexpr,
    STORED: tl.constexpr,
    STEP_VJP: tl.constexpr,
    ACROSS: tl.constexpr,  # as in the forward pass
    RECALLS: tl.constexpr,  # STEP_VJP reads the states before the step
    APPROXIMATE: tl.constexpr,
    UNIT: tl.constexpr,
    PARTS: tl.constexpr,
    SLICES: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PIECES: tl.constexpr,
):
    STATES: tl.constexpr = len(state0_ptrs)
    SAVED: tl.constexpr = STORED - (STATES - 1)
    tile = first_tile + tl.program_id(0)
    tiles = tl.cdiv(B, BLOCK_B)
    direction = tl.program_id(2)
    D = tl.num_programs(2)
    backwards = direction ^ reverse ^ 1  # against the forward pass
    rows = (tile * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[None, :]
    units = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
    mask = (units < H) & (rows < B)
    dtype: tl.constexpr = output_ptr.dtype.element_ty
    output_offsets = direction * H + rows * output_stride_b * UNIT + units
    output_steps = (output_ptr, output_stride_t.to(tl.int64) * UNIT, output_offsets)
    stored_steps, saved_steps = output_steps, output_steps
    if stored_ptr is not None:
        stored_offsets = direction * STORED * H + rows * stored_stride_b * UNIT + units
        stored_steps = (stored_ptr, stored_stride_t.to(tl.int64) * UNIT, stored_offsets)
        saved_steps = (stored_ptr + (STATES - 1) * H, stored_steps[1], stored_offsets)
    if d_output_ptr is not None:
        d_output_offsets = direction * H + rows * d_output_stride_b * UNIT + units
        d_output_steps = (d_output_ptr, d_output_stride_t.to(tl.int64) * UNIT, d_output_offsets)
    d_gates_offsets = direction * GATES * H + rows * x_gates_stride_b * UNIT + units
    state_rows = (direction * B + rows) * H
    if h_mask_ptr is not None:
        h_mask = tl.load(h_mask_ptr + state_rows + units, mask=mask, other=0.0).to(tl.float32)
    if keep_ptr is not None:
        keep_offsets = direction * STATES * H + rows * keep_stride_b * UNIT + units
        keep_steps = (keep_ptr, keep_stride_t.to(tl.int64) * UNIT, keep_offsets)
    lengths = None
    if lengths_ptr is not None:
        lengths = tl.load(lengths_ptr + rows, mask=rows < B, other=0)
    steps = steps_of(T, lengths, offsets_ptr is not None)
    within = lengths if offsets_ptr is not None else None  # where zeros are no part of memory

    # W_hh transposed: rows are the units that h came from, columns the gates that it went to: one
    # gate after the other where their tiles are at hand, one sum over all where they are gathered.
    weight_hh_ptr += direction * GATES * H * H
    GROUPS: tl.constexpr = GATES if SLICES == 1 else 1
    weights = load_weights(
        weight_hh_ptr, units, units < H, D * GATES * H * H, H * H, H, GROUPS, PARTS,
        GATES // GROUPS * H, CHUNK, CHUNKS, PIECES,
    )  # fmt: skip
    params = load_params(param_ptrs, direction * H + units, units < H)
    if ACROSS:
        tl.static_assert(SLICES == 1, "a block has to hold all units of its rows")
        params += (tl.where(units < H, 1.0 / H, 0.0),)
    zero = tl.zeros((BLOCK_S, BLOCK_B), tl.float32)
    d_state = load_or_zero(d_state_n_ptrs, state_rows + units, mask, zero)
    d_params = ()
    for _p in tl.static_range(len(param_ptrs)):
        d_params += (zero,)
    alive = tl.full((), True, tl.int1)
    if SLICES > 1:
        exchange_size = D.to(tl.int64) * B * GATES * H
        flags_ptr += (direction * tiles + tile).to(tl.int64) * T

    # What a step needs is asked for one step before it; and the states before the step two, since
    # they are the states after the next one.
    place = place_of(0, steps, backwards, offsets_ptr)
    place_ahead = place_of(1, steps, backwards, offsets_ptr)
    place_after = place_of(2, steps, backwards, offsets_ptr)
    active = active_at(0, steps, backwards, lengths)
    states = output_steps, stored_steps, state0_ptrs, state_rows + units
    state = load_states(active, states, place, mask, RECALLS, H, DIRECT)
    state_prev = state
    if RECALLS:
        active_ahead = active_at(1, steps, backwards, lengths)
        state_prev = load_states(active_ahead, states, place_ahead, mask, RECALLS, H, DIRECT)
    saved = load_tiles(at(saved_steps, place), mask & active, H, SAVED, DIRECT)
    if keep_ptr is not None:
        keep = load_tiles(at(keep_steps, place), mask & active, H, STATES, DIRECT)
    if d_output_ptr is not None:
        d_output = load_tiles(at(d_output_steps, place), mask & active, H, 1, DIRECT)
    for begin in range(0, steps, STEPS):
        for k in tl.static_range(STEPS):
            i = begin + k
            if offsets_ptr is None:
                place = at_step(i, steps, backwards)
                place_ahead = at_step(i + 1, steps, backwards)
                place_after = at_step(i + 2, steps, backwards)
            else:
                place_later = place_of(i + 3, steps, backwards, offsets_ptr)
            active_ahead = active_at(i + 1, steps, backwards, lengths)
            states_at, active_states = place_ahead, active_ahead
            if RECALLS:
                states_at, active_states = place_after, active_at(i + 2, steps, backwards, lengths)
            state_ahead = load_states(active_states, states, states_at, mask, RECALLS, H, DIRECT)
            wanted = mask & active_ahead
            saved_ahead = load_tiles(at(saved_steps, place_ahead), wanted, H, SAVED, DIRECT)
            d_h = d_state[0]
            if d_output_ptr is not None:
                d_h += d_output[0].to(tl.float32)
                d_output = load_tiles(at(d_output_steps, place_ahead), wanted, H, 1, DIRECT)
            d_after, after = with_first(d_h, d_state), state
            if keep_ptr is not None:
                kept = scale(to_float32(keep), d_after)  # goes straight to the states before
                d_after = subtract(d_after, kept)
                after = last_of(saved, STATES)
                keep = load_tiles(at(keep_steps, place_ahead), wanted, H, STATES, DIRECT)
            d_x_gates, d_h_gates, d_prev, d_params_step = STEP_VJP(
                d_after, to_float32(state_prev), to_float32(after), to_float32(saved), params,
                APPROXIMATE,
            )  # fmt: skip
            if keep_ptr is not None:
                d_prev = add(kept, d_prev)
            written = mask
            if lengths is not None or k > 0:  # an inactive step passes no gradient to its gates
                active = active_at(i, steps, backwards, lengths)
                d_x_gates = zero_where_not(active, d_x_gates)
                d_h_gates = zero_where_not(active, d_h_gates)
                d_params_step = zero_where_not(active, d_params_step)
                written = mask & active_at(i, steps, backwards, within)
            d_gates_at = place * (x_gates_stride_t.to(tl.int64) * UNIT) + d_gates_offsets
            if d_x_gates_ptr is not None:
                store_tiles(d_x_gates_ptr + d_gates_at, d_x_gates, written, H, DIRECT)
            if d_h_gates_ptr is not None:
                store_tiles(d_h_gates_ptr + d_gates_at, d_h_gates, written, H, DIRECT)
            if d_params_ptr is not None:
                d_params = add(d_params, d_params_step)
            if SLICES > 1:
                slot_ptr = exchange_ptr + (i % 2) * exchange_size
                store_tiles(slot_ptr + state_rows * GATES + units, d_h_gates, mask, H, False)
                alive = wait_for_slices(flags_ptr + i, tl.where(alive, patience, 0), SLICES) & alive
            d_h = zero
            if h_mask_ptr is None:
                d_h += d_prev[0]
            if SLICES == 1:
                for gate in tl.static_range(GATES):
                    d_gate = (existing(d_h_gates[gate], mask, H).to(dtype),)
                    d_h = recurrent_product(weights, gate, GATES, d_gate, alive, d_h, 1, 1)
            else:
                d_gates = gather(slot_ptr, state_rows * GATES, rows < B, GATES * H, CHUNK, CHUNKS)
                d_h = recurrent_product(weights, 0, 1, d_gates, alive, d_h, SLICES, PIECES)
            if h_mask_ptr is not None:
                d_h = d_h * h_mask + d_prev[0]
            if grad_clip is not None:
                d_h = clamp(d_h, grad_clip)
            d_before = with_first(d_h, d_prev)
            if lengths is None and k == 0:
                d_state = d_before
            else:  # and hands d_state on as it came
                d_state = where_active(active, d_before, d_state)
            if RECALLS:
                state = state_prev
                state_prev = state_ahead
            else:
                state = state_ahead
            saved = saved_ahead
            if offsets_ptr is not None:
                place = place_ahead
                place_ahead = place_after
                place_after = place_later
    if SLICES > 1:
        d_state = report(alive, d_state, fault_ptr, launch)
    store_wanted(d_state0_ptrs, state_rows + units, d_state, mask)
    if d_params_ptr is not None:  # one part for each batch tile; the host sums them in order
        unit = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
        for p in tl.static_range(len(d_params)):
            part = (p * tiles + tile).to(tl.int64) * D + direction
            d_param = tl.sum(tl.where(mask, d_params[p], 0.0), 1)  # of rows that exist
            tl.store(d_params_ptr + part * H + unit, d_param, mask=unit < H)
